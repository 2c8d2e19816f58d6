"""The tool that answers questions by training, and the scores that the findings are made of."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from machinery.errors import UserError
from machinery.huggingface import config_from_hf, export_hf
from machinery.machine import Machine
from model_utils import count_parameters, flops_per_token, predict
from tools.common import quietly
from tools.experiments import (
    choices,
    compare_sweep,
    curves,
    equal_size,
    frontier,
    induction,
    lengths,
    plot_sweep,
    shape,
    sweep,
)
from tools.experiments.__main__ import FINDINGS, RESULTS, measured_at, repeat
from tools.experiments.tool import PLAIN, places, runs_that_fit


@pytest.fixture
def common(tmp_path, texts):
    """Overrides for runs of a second, in a folder of their own."""
    return {
        "source": texts[0], "val_fraction": 0.2, "tokenizer": "bytes", "vocab_size": 257, "n_embd": 32, "n_ffn": 48,
        "block_size": 16, "batch_tokens": 64, "micro_batch": 4, "max_steps": 6, "eval_every": 3, "eval_tokens": 256,
        "checkpoint_every": 2, "keep_checkpoints": 9, "device": "cpu",
        "runs_dir": str(tmp_path / "runs"), "data_dir": str(tmp_path / "data"),
    }  # fmt: skip


def test_sweep_makes_a_tidy_table_reuses_what_is_finished_and_reports_what_fails(common, capsys):
    variants = {"shallow": {"n_layer": 1}, "nowhere": {"n_layer": 1, "source": "nowhere/*.txt"}}
    table = sweep(variants, seeds=(0,), jobs=1, **common)
    assert list(table.label) == ["shallow", "nowhere"] and not table.isna().loc[0].any()
    good, bad = table.iloc[0], table.iloc[1]
    assert good.status == "finished" and good.error == "" and good.n_layer == 1 and good.steps == 6
    assert good.tokens == 6 * 64 and good.parameters == good.non_embedding + 257 * 32
    assert bad.status == "failed" and "nowhere" in bad.error and math.isnan(bad.val_loss)
    assert "nowhere, seed 0 failed" in capsys.readouterr().out

    summary = Path(good.run) / "summary.json"
    written = summary.stat().st_mtime_ns
    again = sweep({"another label": {"n_layer": 1}, "and one more": {"n_layer": 1}}, **common)
    assert summary.stat().st_mtime_ns == written and (again.val_loss == good.val_loss).all()
    assert json.loads(summary.read_text())["val_loss"] == good.val_loss

    summary.write_bytes(b"")  # cut off by a power cut: the run goes on at its end, and the sweep with it
    assert sweep({"shallow": {"n_layer": 1}}, **common).val_loss[0] == pytest.approx(good.val_loss)

    sweep({"shallow": {"n_layer": 1}}, then=(folders := []).append, **common)
    assert folders == [Path(good.run)]

    steps = curves(table)
    assert set(steps.label) == {"shallow"} and steps.step.max() == 6 and steps.flops.max() == good.flops
    (axes,) = plot_sweep(steps, x="flops", y="val_loss").axes
    assert axes.get_xlabel() == "training compute (FLOPs)" and len(axes.lines) == 1
    (axes,) = plot_sweep(pd.concat([table, table.assign(label="deep")])).axes
    assert axes.get_xlabel() == f"training tokens: {good.tokens:,}"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["shallow", "deep"]

    where = places(common)
    measured = induction.measure_run(good.run, sequences=1, windows=2, **where)
    assert list(measured.step) == [2, 3, 4, 6] and measured.prefix.between(0, 1).all()
    assert len(list((Path(good.run) / "checkpoints").glob("step_*"))) == 1
    pd.testing.assert_frame_equal(induction.measure_run(good.run), measured, rtol=1e-3)  # as kept

    losses = lengths.measure_length(good.run, 64, windows=3, **where)  # four times the trained 16
    assert losses.shape == (64,) and losses.isfinite().all()


@pytest.fixture
def in_this_process(lm, monkeypatch):
    """Runs of a sweep without processes of their own, which take seconds to start."""

    def train(config, threads):
        quietly(lm.train, lm.Config.from_dict(config.to_dict()))
        return ""

    monkeypatch.setattr("tools.experiments.tool.train_apart", train)


@pytest.mark.usefixtures("in_this_process")
def test_runs_on_other_text_are_not_taken_for_those_of_now(common):
    (first,) = sweep({"a": {"n_layer": 1}}, **common).run
    file = Path(common["source"]).with_name("00.txt")
    file.touch()
    assert list(sweep({"a": {"n_layer": 1}}, **common).run) == [first]
    file.write_text("Another beginning.\n" * 40)
    (second,) = sweep({"a": {"n_layer": 1}}, **common).run
    assert second != first and (Path(second) / "summary.json").exists()


@pytest.mark.usefixtures("in_this_process")
def test_runs_that_begin_with_other_weights_are_not_taken_for_those_of_now(lm, common, tmp_path):
    values, places = common | {"n_layer": 1, "max_steps": 1}, []
    for seed in (0, 1):
        lm.train(lm.Config.from_preset("smoke", **values, seed=seed, run_name=f"begun-{seed}"))
        fields = config_from_hf(export_hf(tmp_path / "runs" / f"begun-{seed}", tmp_path / "export"))  # one folder
        places += list(sweep({"a": fields}, **values).run)
    assert len(set(places)) == 2
    assert list(sweep({"a": fields}, **values).run) == places[1:]


def test_runs_of_one_seed_are_compared_in_pairs():
    losses = {("base", 0): 2.0, ("base", 1): 3.0, ("better", 0): 1.8, ("better", 1): 2.9}
    losses |= {("alone", 1): 3.2, ("new", 2): 1.0}
    runs = [(*run, loss) for run, loss in losses.items()]
    table = pd.DataFrame(runs, columns=["label", "seed", "val_bpb"]).assign(status="finished")
    found = compare_sweep(table).set_index("label")
    assert list(found.index) == ["better", "alone"], "without a pair there is nothing to say"
    assert found.loc["better", "difference in val_bpb"] == pytest.approx(-0.15)
    assert found.loc["better", "standard error"] == pytest.approx(0.05)
    assert [*found["verdict"]] == ["better, a hint: two pairs", "one run"]
    row, _ = compare_sweep(table, against="better").to_dict("records")
    assert row["label"] == "base" and row["difference in val_bpb"] == pytest.approx(0.15)
    with pytest.raises(UserError, match="^against 'bettr' is not known; did you mean 'better'"):
        compare_sweep(table, against="bettr")
    assert compare_sweep(table.assign(status="failed")).empty
    with pytest.raises(UserError, match="'base' has two runs of seed 0; give runs of two sweeps labels of their own"):
        compare_sweep(pd.concat([table, table]))


ODD = [
    {"variants": [{"n_layer": 1}]}, {"variants": {"a": None}}, {"seeds": 3}, {"seeds": "01"}, {"jobs": -1},
    {"jobs": 1.5}, {"threads": 0}, {"threads": None}, {"variants": {}}, {"variants": {None: {}}},
    {"variants": {"a": {3: 4}}}, {"seeds": ()}, {"seeds": (0, 1, 0)}, {"then": 3},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_odd_arguments_are_one_line(odd):
    ((name, value),) = odd.items()
    with pytest.raises(UserError, match=f"^{name} (are|is) "):
        sweep(**{"variants": {"a": {}}} | odd)
    if name == "variants":
        with pytest.raises(UserError, match="^variants are "):
            equal_size(value)


def test_losses_that_do_not_compare_are_told(tmp_path, capsys):
    runs = [tmp_path / label for label in "abc"]
    for run, size, tokenizer in zip(runs, (7, 7, 8), "xyx"):
        run.mkdir()
        (run / "data.json").write_text(f'{{"held_out_bytes": {size}}}')
        (run / "tokenizer.json").write_text(f'{{"name": "{tokenizer}"}}')
    table = pd.DataFrame({"label": [*"abc"], "seed": 0, "val_bpb": 1.0, "val_loss": 2.0, "status": "finished"})
    table = table.assign(run=[str(run) for run in runs])
    compare_sweep(table[:1])
    compare_sweep(table[:2])
    assert not capsys.readouterr().out
    compare_sweep(table[:2], "val_loss")
    assert "their tokenizers differ: compare val_bpb" in capsys.readouterr().out
    compare_sweep(table)
    assert "scored on other held-out text, so val_bpb does not compare" in capsys.readouterr().out


def test_tables_without_what_is_asked_of_them_are_one_line(tmp_path):
    table = pd.DataFrame({"label": ["a"], "seed": 0, "status": "finished", "val_bpb": 2.0, "error": "", "tokens": 9})
    table = table.assign(flops=1.0, run=str(tmp_path))
    for call, message in (
        (lambda: compare_sweep(None), "the table is None; give what sweep"),
        (lambda: compare_sweep(table, "nope"), "no column 'nope'; its columns are label, seed, status"),
        (lambda: compare_sweep(table, "error"), "column 'error' of the table holds no numbers"),
        (lambda: plot_sweep(table, y="nope"), "no column 'nope'"),
        (lambda: plot_sweep(curves(table.assign(status="failed"))), "no column 'label'; its columns are none, as when"),
        (lambda: curves(table), "has no steps in metrics.jsonl"),
        (lambda: equal_size({"a": {}}, parameters="many"), "parameters is 'many'; give a whole number"),
        (lambda: equal_size({"a": {}}, parameters=10**18), "^'a': n_ffn is 2604166666666601"),
    ):
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.parametrize("options", [{"seed": 5}, {"run_name": "mine"}, {"variants": {"a": {"seed": 1}}}], ids=str)
def test_what_a_sweep_would_overrule_is_refused(options):
    with pytest.raises(UserError, match="^(seed|run_name) of 'a' would not count: "):
        sweep(**{"variants": {"a": {}}} | options)


def test_every_variant_is_trained_with_all_seeds_of_an_iterator(common, monkeypatch):
    monkeypatch.setattr("tools.experiments.tool.train_apart", lambda *_: "not now")
    table = sweep({"a": {"n_layer": 1}, "b": {"n_layer": 2}}, seeds=(seed for seed in (0, 1)), jobs=1, **common)
    assert list(zip(table.label, table.seed)) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_as_many_runs_at_a_time_as_memory_and_disk_hold(lm, common, monkeypatch):
    config = lm.Config.from_preset("smoke", **(common | {"max_steps": 10}))  # 5 checkpoints, and the best one
    with torch.device("meta"):
        model = lm.build_model(config)
    machine = Machine.find("cpu", "float32")
    optimizers = lm.build_optimizers(model, config, machine)
    needed = predict(model, optimizers, config, machine, 1.0)
    memory = 3.1 / 0.8 * 1e9 * (1 + needed["peak memory (GB)"])
    monkeypatch.setattr(Machine, "free_memory", lambda self: int(memory))
    for runs, disk in ((3, 10**15), (2, 2 * 2 * 6.1 * 1e9 * needed["checkpoint (GB)"]), (1, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, disk=disk: SimpleNamespace(free=disk))
        assert runs_that_fit(config, model, optimizers, machine) == runs


@pytest.mark.usefixtures("in_this_process")
def test_a_sweep_settles_the_batch_whatever_a_run_of_the_preset_s_name_has(lm, common):
    common = {name: value for name, value in common.items() if name not in ("max_steps", "batch_tokens")}
    row = sweep({"auto": {"batch_tokens": "auto", "max_steps": 3}}, **common)
    assert row.status.item() == "finished" and row.tokens.item() >= 3 * 16
    preset = lm.Config.from_preset("smoke", **(PLAIN | common | {"batch_tokens": "auto", "max_steps": 3}))
    (Path(common["runs_dir"]) / preset.run_name / "checkpoints" / "step_00000001").mkdir(parents=True)
    (Path(common["runs_dir"]) / preset.run_name / "config.json").write_text('{"batch_tokens": 64}')
    assert sweep({"auto": {"batch_tokens": "auto", "max_steps": 3}}, **common).tokens.item() == row.tokens.item()


def test_a_configuration_that_cannot_work_is_refused_before_training(lm, common, monkeypatch):
    with pytest.raises(UserError, match="did you mean 'gqa'"):
        sweep({"a": {}, "b": {"attention": "gqaa"}}, **common)
    with pytest.raises(UserError, match="smaller n_embd or n_layer"):
        equal_size({"small": {"n_embd": 16}, "large": {"n_embd": 256}}, **(common | {"n_ffn": 16}))
    monkeypatch.setitem(lm.FFNS, "none", lambda config: torch.nn.Identity())
    monkeypatch.setattr("tools.experiments.tool.load_definitions", lambda: lm)
    with pytest.raises(UserError, match="'a' has as many parameters whatever n_ffn is"):
        equal_size({"a": {"ffn": "none"}}, **common)
    assert not Path(common["runs_dir"]).exists()


@pytest.mark.parametrize("counted", ["non_embedding", "parameters"])
def test_variants_are_made_of_equal_size_by_what_is_counted(lm, counted):
    variants = equal_size({"large": {"vocab_size": 1024}, "small": {"vocab_size": 512}}, counted=counted)
    sizes = []
    for values in variants.values():
        with torch.device("meta"):
            counts = count_parameters(lm.build_model(lm.Config.from_preset("smoke", **values)))
        sizes.append(counts["total"] - (counts["embedding"] + counts["head"] if counted == "non_embedding" else 0))
    assert abs(sizes[0] - sizes[1]) <= 3 * 2 * 64 / 2 + 1  # half a hidden channel in each of the two blocks
    assert (variants["large"]["n_ffn"] == variants["small"]["n_ffn"]) == (counted == "non_embedding")
    with pytest.raises(UserError, match="counted is 'all'; use 'non_embedding' or 'parameters'"):
        equal_size(variants, counted="all")


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_grids_are_of_equal_size_and_budgets_are_met(lm, scale):
    def size(values, common):
        config = lm.Config.from_preset("smoke", **(common | values))
        with torch.device("meta"):
            model = lm.build_model(config)
        counts = count_parameters(model)
        return counts["total"] - counts["embedding"] - counts["head"], flops_per_token(model, config), config

    for finding, groups in ((shape, 2), (choices, 1)):
        settings = finding.SCALES[scale]
        variants = finding.variants(settings)
        for group in np.array_split([size(values, settings["common"])[0] for values in variants.values()], groups):
            assert len(group) >= 4 and group.max() / group.min() < 1.02
    settings = frontier.SCALES[scale]
    for label, values in frontier.variants(settings).items():
        _, flops, config = size(values, settings["common"])
        assert config.max_steps * config.batch_tokens * flops == pytest.approx(float(label.split(", ")[1]), rel=0.03)


@pytest.mark.parametrize("name", FINDINGS)
def test_committed_figures_and_words_come_from_the_committed_tables(name, tmp_path):
    results = RESULTS / "experiments"
    if not (results / f"{name}.csv").exists():
        pytest.skip(f"results/experiments/{name}.csv has not been measured yet: make experiments")
    shutil.copy(results / f"{name}.csv", tmp_path)
    page = results.with_suffix(".md").read_text("utf-8")
    words = repeat(name, "cpu", tmp_path, measured_at(page, FINDINGS[name].TITLE))
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000 and (results / f"{name}.png").exists()
    assert "\n| --- |" in words and words in page.replace("(experiments/", f"({tmp_path.name}/")


def test_prefix_matching_is_one_for_perfect_induction_and_almost_nothing_for_uniform_attention():
    period = 32
    tokens = induction.repeated_tokens(1000, 2 * period, 3)
    assert torch.equal(tokens[:, :period], tokens[:, period:])
    perfect = torch.zeros(1, 2 * period, 2 * period)
    for t in range(period, 2 * period):
        earlier = (tokens[0, :t] == tokens[0, t]).nonzero()[0]
        perfect[0, t, earlier + 1] = 1
    uniform = torch.ones(1, 2 * period, 2 * period).tril()
    uniform /= uniform.sum(-1, keepdim=True)
    previous = torch.eye(2 * period).roll(-1, dims=1)[None]
    assert induction.prefix_matching(perfect, period) == 1
    assert 0 < induction.prefix_matching(uniform, period) < 1.5 / period
    assert induction.prefix_matching(previous, period) == 0


def test_in_context_score_is_negative_where_context_helps():
    falling = torch.linspace(5, 3, 200).expand(4, 200)
    assert induction.in_context_score(falling) < -1 and induction.in_context_score(falling.flip(-1)) > 1
    assert induction.in_context_score(torch.ones(4, 200)) == 0


def test_a_bump_is_what_stands_above_the_hull():
    tokens = np.arange(1, 200.0)
    smooth = 2 + 3 * tokens**-0.5
    bumped = smooth - 0.4 / (1 + np.exp(-(tokens - 100) / 5))
    assert induction.bump(tokens, smooth)[0] < 0.05
    height, place = induction.bump(tokens, bumped)
    assert height > 0.1 and 60 < place < 100


def test_the_frontier_finds_the_optimum_of_a_known_law():
    sizes, rows = np.geomspace(2e4, 2e6, 7), []
    for budget in (1e12, 4e12, 1.6e13):
        for size in sizes:
            best = 1e5 * (budget / 1e12) ** 0.5
            for seed in (0, 1):
                row = {"label": f"{size:.0f}, {budget}", "seed": seed, "budget": budget, "parameters": size}
                rows.append(row | {"tokens": budget / 6 / size, "val_loss": 2 + 0.1 * np.log(size / best) ** 2})
    table = pd.DataFrame(rows)
    table["train_seconds"] = table.budget / 1e12  # every size at the same speed: equal time is equal compute
    points = frontier.fit(table)
    timed = frontier.fit(frontier.at_equal_time(table))
    assert timed.budget.tolist() == pytest.approx([1, 4, 16])
    assert timed.parameters.tolist() == pytest.approx(points.parameters.tolist(), rel=1e-6)
    assert points.inside.all() and points.parameters.iloc[0] == pytest.approx(1e5, rel=1e-3)
    assert frontier.power_law(points.budget, points.parameters)[1] == pytest.approx(0.5, abs=1e-3)
    assert "the finding holds here" in frontier.say(table)
    assert frontier.at_equal_time(table.assign(train_seconds=1.0)).empty  # no time that two runs of a size enclose
