"""The benchmarks at their smallest: what they compare is the same work, and what they report is what was measured."""

import json
import re

import pytest
import torch
from conftest import LM

from machinery.errors import UserError
from machinery.machine import Machine
from tools import card, runs
from tools.bench import nanochat, recipe, steps, traffic
from tools.bench.common import in_own_process, pair_for, slug, take_turns
from tools.bench.generation import compare_generation
from tools.bench.peers import MODELS, Transformers, make_config
from tools.bench.scaling import grows_faster, measure_scaling
from tools.bench.tokenization import compare_tokenization
from tools.common import quietly, table
from tools.runs import Results

MACHINE = Machine.find("cpu")


def test_calls_take_turns_and_the_first_round_does_not_count():
    order = []
    seconds = take_turns({name: lambda name=name: order.append(name) for name in "abc"}, MACHINE, rounds=2)
    assert order == list("abcabcabc") and set(seconds) == set("abc")


@pytest.mark.long
def test_peak_memory_is_of_a_process_of_its_own():
    assert in_own_process("tools.bench.steps", "transformers, as shipped", "tiny", "cpu")["bytes"] > 0
    with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
        in_own_process("tools.bench.steps", "nobody", "tiny", "cpu")


@pytest.mark.parametrize("name", steps.CONTENDERS)
def test_every_library_is_the_same_architecture_and_learns(name, monkeypatch):
    if "x-transformers" in name:
        pytest.importorskip("x_transformers", reason="`make bench` installs it")
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)  # what is compared here does not depend on it
    config = make_config("tiny")
    ours = sum(p.numel() for p in LM.build_model(config).parameters())
    model, step = steps.build(name, config, MACHINE)
    assert sum(p.numel() for p in model.parameters()) == ours
    pair = pair_for(config, config.micro_batch, MACHINE.device)  # the batch of `step`
    before = model(*pair).item()
    for _ in range(5):
        step()
    assert model(*pair).item() < before - 0.05


def test_a_library_that_fails_here_is_named_and_left_out(monkeypatch, capsys):
    assert list(steps.measure_memory("tiny", MACHINE, ("nobody",))) == []
    assert "nobody does not run here: tools.bench.steps: KeyError: 'nobody'\n" in capsys.readouterr().out
    monkeypatch.setattr(steps, "OURS", "nobody")
    with pytest.raises(RuntimeError, match="KeyError"):
        steps.measure_memory("tiny", MACHINE, ("nobody",))


def test_tokenization_compares_the_same_tokens(texts):
    rows = compare_tokenization(MACHINE, texts[0], vocab_size=300, rounds=1)
    fast = compare_tokenization(MACHINE, texts[0], vocab_size=300, rounds=1, slow_ones=False)
    assert len(rows) == 4 and len(fast) == 2 and all(row["MB/s"] > 0 for row in rows + fast)
    assert [row["of raw tiktoken"] for row in rows if row["library"] == "tiktoken, batch"] == [1.0]


def test_generation_is_measured_per_batch():
    rows = compare_generation(MACHINE, "tiny", batches=(1, 2), n_prompt=4, n_new=3, rounds=1)
    assert [row["batch"] for row in rows] == [1, 2]
    for row in rows:
        assert row["ours is faster by"] == pytest.approx(row["LMHarness tokens/s"] / row["transformers tokens/s"])


def test_cost_is_set_against_the_formula():
    grid = {"depth (n_layer)": [{"n_layer": n, "n_embd": 64, "vocab_size": 300} for n in (1, 2)]}
    rows = measure_scaling(MACHINE, grid, batch_tokens=256, rounds=1)
    assert [row["size"] for row in rows] == [1, 2] and rows[0]["ratio"] == 1
    assert 1 < rows[1]["formula grows"] < 2
    assert grows_faster([{"ratio": 1.2}, {"ratio": 3.0}]) == [{"ratio": 3.0}]


def made_up(path, losses):
    """Results of the runs that `plan` asks for, with bits per byte that `losses(run)` gives, until it asks for none."""
    results = Results(path)
    while missing := [run for run in recipe.plan(results) if run.key not in results.lines]:
        for run in missing:
            line = {"key": run.key, **vars(run), "status": "finished", "parameters": 1, "val_bpb": losses(run)}
            line |= {"date": "2026-01-01", "device": "a machine", "dtype": "float32"}
            results.add(line)
    return results


@pytest.fixture
def small_plan(monkeypatch):
    """Fewer runs: two budgets and seeds, three choices."""
    monkeypatch.setattr(recipe, "BUDGETS", (1000, 2000))
    monkeypatch.setattr(recipe, "SEEDS", (0, 1))
    monkeypatch.setattr(recipe, "CHOICE_SEEDS", (0, 1))
    monkeypatch.setattr(recipe, "CHOICE_TOKENS", 1000)
    monkeypatch.setattr(recipe, "AGAIN_TOKENS", 2000)
    monkeypatch.setattr(
        recipe, "CHOICES", {"cosine": {"schedule": "cosine"}, "MLP": {"ffn": "mlp"}, "wide": {"n_ffn": 600}}
    )


def test_others_come_into_the_contest_with_their_best_rates(tmp_path, small_plan):
    def losses(run):
        return 2 + abs(run.overrides.get("lr", 0.002) - 0.001) + abs(run.scale - 2.0) if "nano" in run.name else 1.5

    results = made_up(tmp_path / "recipe.jsonl", losses)
    names = {run.name for run in recipe.contest(results, "english", 1, 2000)}
    assert {"nanoGPT, lr 0.001", "nanochat, whole, rates × 2", "nanochat, llama, rates × 2"} < names
    again = Results(tmp_path / "recipe.jsonl")
    assert again.lines == results.lines and all(run.key in again.lines for run in recipe.plan(again))
    assert not any(run.by for run in recipe.plan(again, others=False))


def test_the_summary_says_what_helped_and_what_hurt(tmp_path, small_plan):
    changes = {"cosine": -0.5, "MLP": 0.5, "wide": 0.0, "with value embeddings": -0.1}

    def losses(run):
        return 1.5 + run.seed / 100 + 200 / run.tokens + changes.get(run.name, 0.0) + run.seed * (run.name == "wide")

    recipe.write_summary(made_up(tmp_path / "recipe.jsonl", losses), tmp_path)
    text = (tmp_path / "recipe.md").read_text()
    rows = {line.split(" | ")[0][2:]: line for line in text.splitlines() if line.startswith("| ")}
    assert rows["cosine"].count("| better |") == 2 and rows["cosine"].count("| -0.5000 |") == 2  # and after more tokens
    assert rows["MLP"].count("| worse |") == 1 and "| no difference seen |" in rows["wide"]
    assert "| with value embeddings | 2,000 | 1.5050 | 0.0050 | 2 | 1 | -0.1000 | 0.0000 | better |" in text
    assert (tmp_path / "recipe.png").stat().st_size > 1000


def test_the_notebook_shows_single_changes_as_they_were_measured(tmp_path, small_plan, monkeypatch):
    monkeypatch.setattr(recipe, "SHOWN", {"cosine": "a cosine (5.2)", "MLP": "an MLP (4.4)", "wide": "wider"})
    changes = {"cosine": -0.5, "MLP": 0.5}

    def losses(run):
        return 1.5 + run.seed / 100 + changes.get(run.name, 0.0) + run.seed * (run.name == "wide")

    lines = recipe.changes_of_demo(made_up(tmp_path / "recipe.jsonl", losses)).splitlines()
    assert lines[0] == "| change | 1,000 tokens | 2,000 tokens |"
    assert lines[2:] == ["| a cosine (5.2) | -0.500 | -0.500 |", "| an MLP (4.4) | +0.500 | not measured |",
                         "| wider | no difference seen | not measured |"]  # fmt: skip
    assert "make recipe" in recipe.changes_of_demo(Results(tmp_path / "none.jsonl"))


def test_the_changes_that_the_notebook_shows_are_measured():
    lines = recipe.changes_of_demo().splitlines()[2:]
    assert len(lines) == len(recipe.SHOWN) and all(re.search(r"\d|no difference", line) for line in lines)


def test_an_effect_has_the_error_of_its_pairs():
    assert runs.paired_effect({0: 1.1, 1: 2.3, 2: 9.0}, {0: 1.0, 1: 2.0}) == (pytest.approx(0.2), pytest.approx(0.1), 2)
    assert [runs.verdict(-0.3, 0.1), runs.verdict(0.3, 0.1), runs.verdict(0.1, 0.1)] == [
        "better", "worse", "no difference seen",
    ]  # fmt: skip
    assert runs.verdict(-1.0, float("nan")) == "one run"


def test_nanochat_is_a_clone_of_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("NANOCHAT", raising=False)
    assert nanochat.clone() is None
    monkeypatch.setenv("NANOCHAT", str(tmp_path))
    with pytest.raises(UserError, match="has no nanochat/gpt.py"):
        nanochat.clone()


def test_nanochats_schedules_are_those_of_its_script():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 1.0, "initial_lr": 2.0, "kind": "muon"}])
    seen = []
    for step in (0, 39, 400, 1000, 1999):
        nanochat.set_rates(optimizer, step, 2000)
        group = optimizer.param_groups[0]
        seen.append((group["lr"] / 2, group["momentum"], group["weight_decay"]))
    rates, momenta, decays = zip(*seen)
    assert rates[:3] == pytest.approx([1 / 40, 1.0, 1.0]) and 0.05 < rates[4] < 0.051
    assert rates[3] == pytest.approx(1000 / 1300 + (1 - 1000 / 1300) * 0.05)
    assert momenta[0] == 0.85 and momenta[2] == pytest.approx(0.97) and momenta[4] == pytest.approx(0.90, abs=1e-3)
    assert decays[0] == pytest.approx(0.28) and decays[3] == pytest.approx(0.14)


def test_a_run_is_trained_and_a_failure_is_a_line(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "DATA", tmp_path / "data")
    overrides = {"source": texts[0], "tokenizer": "bytes", "vocab_size": 257, "n_layer": 1, "block_size": 32}
    run = runs.Run("tiny", overrides | {"batch_tokens": 64, "compile": False}, 0, 256, scores=2)
    line = runs.train_run(run)
    assert line["status"] == "finished" and 0 < line["val_bpb"] < 9 and line["key"] == run.key
    assert [share for share, _ in line["curve"]] == [0.0, 0.5, 1.0]
    monkeypatch.setattr(runs, "train_apart", lambda config, threads: f"DataError: source {config.source!r}")
    line = runs.train_run(runs.Run("absent", {"source": "nowhere/*.txt"}, 0, 256))
    assert line["status"] == "failed" and "nowhere" in line["error"]


def test_reports_are_tables_with_names_of_files():
    assert table([{"a": 1, "b": 0.5}, {"a": None, "b": 2}], {"a": "d", "b": ".1f"}) == (
        "| a | b |\n| --- | --- |\n| 1 | 0.5 |\n|  | 2.0 |"
    )
    assert json.dumps(slug(MACHINE)).isascii() and " " not in slug(MACHINE)


@pytest.mark.parametrize("name", MODELS)
def test_the_models_that_are_compared_have_equally_many_weights(name):
    pytest.importorskip("transformers")
    with torch.device("meta"):
        models = LM.build_model(make_config(name)), Transformers(make_config(name))
    ours, theirs = (sum(parameter.numel() for parameter in model.parameters()) for model in models)
    assert ours == theirs


def test_the_row_of_a_card_is_what_its_run_left(texts, tmp_path, tiny, capsys, monkeypatch):
    config = tiny(
        source=texts[0], val_fraction=0.2, vocab_size=257, max_steps=4, eval_tokens=512, sample_tokens=4, prompt="line",
        data_dir=str(tmp_path / "data"), runs_dir=str(tmp_path / "runs"), run_name="mine", compile=False, micro_batch=2,
    )  # fmt: skip
    monkeypatch.setattr("sys.argv", ["card", str(tmp_path / "runs" / "mine")])
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "environment.json").write_text("{}")
    with pytest.raises(UserError, match="has no summary.json of training; let the run end"):
        card.card_row(run)
    summary = quietly(LM.train, config)
    row = card.card_row(run)
    assert (row["micro-batch"], row["card"], row["loss after an hour"]) == (2, MACHINE.name, None)
    assert (row["bits per byte"], row["tokens/s"]) == (summary["val_bpb"], summary["tokens_per_second"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "summary.json").write_text(json.dumps(summary | {"train_seconds": 3700.0, "mfu": 0.5}))
    late = {"step": 9, "tokens": 9, "seconds": 3650.0, "val_loss": 0.1}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, late]))
    hour = [line["val_loss"] for line in lines if "val_loss" in line][-1]
    assert card.card_row(run)["loss after an hour"] == hour
    card.main()
    printed = capsys.readouterr()
    for odd in ({"train_seconds": 9.0}, {"train_seconds": "x"}, summary | {"parameters": "x"}):
        (run / "summary.json").write_text(json.dumps(odd))
        with pytest.raises(UserError, match="mine: its files do not hold what a row needs .*; is it the folder of"):
            card.main()
    assert printed.out.count("|") == card.PAGE.read_text().splitlines()[-1].count("|") and f"{hour:.3f}" in printed.out
    assert "| 50% |" in printed.out and "results/cards.md" in printed.err


@pytest.mark.long
def test_a_stream_of_half_the_width_is_read_and_written_as_often():
    """Sixteen times a block, forward and backward: planned for a card that is not there."""
    small = {"n_embd": 256, "n_head": 2, "n_kv_head": 1, "n_ffn": 512}
    wide, narrow = (traffic.count(stream, **small) for stream in (torch.float32, torch.bfloat16))
    assert wide["both"] - narrow["both"] == pytest.approx(16 * 2 * 256 / 1024, abs=0.1)
    assert 0 < narrow["forward"] < narrow["backward"] and narrow["kernels"] <= wide["kernels"]


def test_edits_of_a_block_compute_what_the_block_does(monkeypatch):
    def computed(**fields):
        torch.manual_seed(0)
        config = traffic.lm.Config.from_preset("smoke", **fields)
        return traffic.Stack(config)(torch.randn(2, 8, config.n_embd))

    for choices, siblings in traffic.SIBLINGS.items():
        for name, sibling in siblings.items():
            monkeypatch.setitem(getattr(traffic.lm, choices), name, sibling)
            assert (computed(**{choices[:-1].lower(): name}) - computed()).abs().max() < 1e-5, name
