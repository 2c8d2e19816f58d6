"""The dial and the forecast: a batch that follows the budget, a law that finds what made its runs."""

import json

import pytest
from conftest import FLAT_LAW, LM

from machinery import budget, forecast
from machinery.budget import best_batch, settle_batch, tokens_of_steps
from machinery.errors import UserError
from machinery.machine import Machine
from machinery.watch import print_ending
from model_utils import best_shape, predict
from tools import forecast as short
from tools.runs import Results

CPU = Machine.find("cpu", "float32")
TRUE = {"floor": 0.6, "alpha": 0.3, "beta": 0.35, "n": 5e5, "d": 8e5}  # a law


def test_the_law_of_the_batch():
    assert best_batch(3.7e9) == 524_288 and best_batch(2 * 3.7e9) / best_batch(3.7e9) == pytest.approx(2**0.383)
    tokens = tokens_of_steps(7000)
    assert tokens == pytest.approx(7000 * best_batch(tokens))
    assert best_batch(1.4e6) == 1400  # a thousand steps at least
    tokens = tokens_of_steps(200)  # or as many as there may be
    assert tokens == pytest.approx(200 * best_batch(tokens, 200))


def test_auto_follows_the_budget_and_moves_the_rates(lm, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(budget, "measure_matmul_flops", lambda _: 165e12 * 0.8)
    settled = {hours: settle_batch(lm.Config.from_preset("day", max_hours=hours), CPU) for hours in (1, 24, 600)}
    assert [config.batch_tokens for config in settled.values()] == [131072, 524288, 2097152]
    assert settled[24].lr == 0.02 and settled[1].lr == pytest.approx(0.02 / 2)
    assert settled[1].embedding_lr == pytest.approx(settled[24].embedding_lr / 2)
    assert (
        "131,072 tokens a step for a run of about 150,000,000; rates of 524,288 tokens move with it: lr 0.02 → 0.01,"
        in capsys.readouterr().out
    )
    limited = settle_batch(lm.Config.from_preset("day", max_tokens=10**8), CPU)  # the limit that is reached first
    assert limited.batch_tokens == 131072
    odd = tmp_path / "odd" / "config.json"  # of a run that somebody wrote by hand
    odd.parent.mkdir()
    named = {"runs_dir": str(tmp_path), "run_name": "odd"}
    (odd.parent / "checkpoints" / "step_00000001").mkdir(parents=True)
    for batch in ("auto", 10**400):
        odd.write_text(json.dumps({"batch_tokens": batch}))
        assert settle_batch(lm.Config.from_preset("day", max_tokens=10**8, **named), CPU).batch_tokens == 131072
    odd.write_text(json.dumps({"batch_tokens": 1024}))
    auto = lm.Config.from_preset("day", max_tokens=10**8, **named)
    assert settle_batch(auto, CPU).batch_tokens == 1024
    (odd.parent / "checkpoints" / "step_00000001").rmdir()  # it ended before its first checkpoint: begun anew
    assert settle_batch(auto, CPU).batch_tokens == 131072
    capsys.readouterr()
    given = lm.Config.from_preset("day", batch_tokens=65536)
    assert settle_batch(given, CPU) is given and not capsys.readouterr().out


def test_a_prediction_needs_a_number_of_tokens(lm):
    config = lm.Config.from_preset("day")
    with pytest.raises(UserError, match="settle_batch"):
        predict(*lm.outline(config, CPU), config, CPU, 1.0)


def test_auto_takes_a_preset_s_rates_for_the_batch_that_they_are_for(lm):
    demo = lm.PRESETS["demo"]  # its rates were tuned at 2,048 tokens
    auto = settle_batch(lm.Config.from_preset("demo", batch_tokens="auto", max_tokens=250_000, head_lr=0.5), CPU)
    assert auto.batch_tokens == 256
    assert auto.lr == pytest.approx(demo["lr"] * (256 / 2048) ** 0.5)
    assert auto.embedding_lr == pytest.approx(demo["embedding_lr"] * (256 / 2048) ** 0.5)
    assert auto.head_lr == pytest.approx(0.5 * (256 / 524288) ** 0.5)  # what was asked for, as in `day`


def test_a_run_keeps_its_batch_when_its_budget_grows(lm, tiny, texts, tmp_path, capsys):
    places = {"source": texts[0], "runs_dir": str(tmp_path / "runs"), "data_dir": str(tmp_path / "data")}
    config = tiny(batch_tokens="auto", max_tokens=4096, max_steps=0, val_fraction=0.2, **places)
    first = lm.train(config)
    begun = json.loads((lm.Path(config.runs_dir) / config.run_name / "config.json").read_text())
    again = lm.train(lm.replace(config, max_tokens=4 * begun["batch_tokens"] + first["tokens"]))
    assert again["tokens"] >= first["tokens"] + 4 * begun["batch_tokens"]
    assert "as this run was begun" in capsys.readouterr().out
    saved = json.loads((lm.Path(config.runs_dir) / config.run_name / "config.json").read_text())
    assert saved["batch_tokens"] == begun["batch_tokens"] and saved["lr"] == begun["lr"]


def test_a_law_is_found_again_and_knows_where_it_ends(lm, monkeypatch, tmp_path):
    runs = [
        {"multiplying": n, "tokens": d, "val_bpb": forecast.expected(TRUE, n, d)}
        for n in (5e5, 2e6, 5e6) for d in (2e5, 5e5, 1e6)
    ]  # fmt: skip
    law = short.fit_law(runs)
    assert forecast.expected(law, 2e6, 3e6) == pytest.approx(forecast.expected(TRUE, 2e6, 3e6), abs=0.01)
    law |= {"recipe": {"vocab_size": 4096}, "batch_tokens": 2048, "error": [[5e5, 0.02]]}
    law |= {"way": [[0.1, 0.3, 0.02], [0.5, 0.2, 0.02], [1.0, 0.0, 0.0]]}
    monkeypatch.setattr(forecast, "LAWS", tmp_path / "forecast.json")
    (tmp_path / "forecast.json").write_text(json.dumps({"python": law}))
    config = lm.Config.from_preset("demo")
    found = forecast.forecast(config, 2e6, 1e7, 1e6)
    assert found.high - found.low == pytest.approx(0.08) and found.at(1.0) == pytest.approx((found.low, found.high))
    assert found.at(0.5)[0] > found.high and found.at(0.01) is None
    assert forecast.forecast(config, 2e6, 1e7, 1.1e6) is None  # longer than the runs: text repeats
    assert forecast.forecast(config, 2e7, 1e8, 1e6) is None  # far larger
    assert forecast.forecast(lm.replace(config, batch_tokens=4096), 2e6, 1e7, 1e6) == found
    for other in ({"source": "texts/*.txt"}, {"vocab_size": 8192}, {"batch_tokens": 8192}):  # text, recipe, few steps
        assert forecast.forecast(lm.replace(config, **other), 2e6, 1e7, 1e6) is None
    web = forecast.forecast(lm.Config.from_preset("day"), 2.2e8, 1.5e9, 3.7e9)
    assert 0.75 < web.low < 0.829 < web.high < 0.9 and web.at(0.5) is None
    for parameters in (2.2e7, 2.2e9):  # far from the best size for as many operations
        tokens = 3.7e9 * 2.2e8 / parameters
        other = forecast.forecast(lm.Config.from_preset("day"), parameters, 6.8 * parameters, tokens)
        assert other.middle > web.middle + 0.02 and other.high - other.low > web.high - web.low


def test_a_run_is_held_against_its_forecast(lm, tiny, texts, monkeypatch, tmp_path, capsys):
    law = FLAT_LAW | {"recipe": {"tokenizer": "bytes"}, "batch_tokens": tiny().batch_tokens}
    law |= {"way": [[0.2, 3.0, 0.5], [1.0, 0.0, 0.0]], "parameters": [1e3, 1e6], "tokens": [100, 10000]}
    monkeypatch.setattr(forecast, "LAWS", tmp_path / "forecast.json")
    (tmp_path / "forecast.json").write_text(json.dumps({texts[0]: law}))
    places = {"runs_dir": str(tmp_path / "runs"), "data_dir": str(tmp_path / "data")}
    config = tiny(source=texts[0], max_steps=20, eval_every=10, val_fraction=0.2, **places)
    summary = lm.train(config)
    said = capsys.readouterr().out
    assert "forecast     2.000 to 4.000 bits per byte held out" in said
    assert f"forecast 2.000 to 4.000, came {summary['val_bpb']:.3f} bits per byte\n" in said
    middle = next(line for line in said.splitlines() if line.startswith("step      10"))
    assert "as expected" in middle or "the band of" in middle
    band = json.loads((lm.Path(config.runs_dir) / config.run_name / "expected.json").read_text())
    assert len(band["tokens"]) == len(band["low"]) == 2
    assert summary["predicted"]["bits per byte, low"] == pytest.approx(2.0)


def test_a_run_that_came_to_more_tokens_is_held_against_the_law_for_these(capsys):
    law = FLAT_LAW | {"floor": 1.0, "alpha": 1.0, "beta": 1.0, "d": 5e5, "error": [[5e5, 0.1]]}
    law |= {"way": [[0.5, 0.0, 0.0], [1.0, 0.0, 0.0]]}
    foretold = forecast.by_law(law, 2e6, 5e5)  # 2.0; twice the tokens give 1.5
    assert foretold.place(0.5, 250_000, 3.0) == ", as expected" == foretold.place(0.5, 500_000, 2.0)
    assert foretold.place(0.5, 500_000, float("nan")).startswith(", above")
    assert foretold.place(0.5, 500_000, 3.0) == ", above the band of 1.800 to 2.200"
    assert not foretold.place(1e-9, 0, 9.0)
    print_ending({"val_bpb": 1.5}, 0.0, False, foretold, tokens=1_000_000)
    print_ending({"val_bpb": 2.0}, 0.0, False, foretold, tokens=510_000)
    best = {"best_val_bpb": 1.9, "best_step": 0}
    print_ending(best | {"val_bpb": 1.8}, 0.1, False)  # of all held-out text: lower than the best of a part of it
    print_ending(best | {"val_bpb": 2.1}, 0.1, False)
    assert capsys.readouterr().out.splitlines() == [
        "forecast 1.800 to 2.200, came 1.500 bits per byte; with 2.00 times the tokens foretold, 1.300 to 1.700",
        "forecast 1.800 to 2.200, came 2.000 bits per byte",
        "held-out loss was best at step 0, 0.1000 bits per byte lower than when the same text was last scored",
    ]


def test_the_law_is_fitted_to_short_runs_and_held_against_others(tmp_path):
    results = Results(tmp_path / "forecast.jsonl")
    for run in short.fitted() + short.unseen():
        line = {"key": run.key, **vars(run), "device": "a machine", "dtype": "float32", "val_bpb": 1.0}
        results.add(line)
        size = short.line_of(results, run)["multiplying"]
        end = forecast.expected(TRUE, size, run.tokens)
        curve = [[share / 10, end + 0.3 * (1 - share / 10)] for share in range(11)]
        results.add(line | {"val_bpb": end, "curve": curve})
    short.write_forecast(results, results, tmp_path)
    law = json.loads((tmp_path / "forecast.json").read_text())["python"]
    demo = LM.Config.from_preset("demo")
    assert all(getattr(demo, name) == value for name, value in law["recipe"].items())
    assert "lr" in law["recipe"] and "n_layer" not in law["recipe"]
    assert (
        len(law["error"]) == 3 and all(error < 0.01 for _, error in law["error"]) and law["way"][-1] == [1.0, 0.0, 0.0]
    )
    most = short.MOST_EPOCHS * short.TEXT_TOKENS["python"]
    runs = [run for run in short.fitted() + short.unseen() if run.config().source == "python"]
    assert law["runs"] == sum(run.tokens <= most for run in runs) < len(runs)
    text = (tmp_path / "forecast.md").read_text()
    assert (
        f"of {len(short.unseen())} ended within their band" in text
        and "| python, 6 × 192, seed 0 | 1,500,000 |" in text
    )


def test_the_best_shape_is_inside_of_what_was_tried_or_not_known(lm, monkeypatch, capsys):
    monkeypatch.setattr(budget, "measure_matmul_flops", lambda _: 165e12 * 0.8)
    day = lm.Config.from_preset("day")
    shape = best_shape(day, CPU, hours=24)
    assert shape["n_embd"] % 128 == 0 and abs(shape["n_embd"] - 64 * shape["n_layer"]) <= 64
    printed = capsys.readouterr().out
    assert 10 <= shape["n_layer"] <= 20 and printed.count("<- best") == 1 and "0.8" in printed.split("token,")[1]
    settle_batch(lm.replace(day, **shape), CPU)  # it is a configuration
    with pytest.raises(UserError, match="the best size for 24 hours of 'texts/.*' is not known: laws are for"):
        best_shape(lm.replace(day, source="texts/*.txt"), CPU, hours=24)
    demo = lm.Config.from_preset("demo")  # of which smaller ones would repeat the text
    for config, hours, end, change in [
        (demo, 0.001, "smallest", "fewer"), (day, 0.001, "smallest", "more"), (day, 1e6, "largest", "fewer")
    ]:  # fmt: skip
        at_the_end = best_shape(config, CPU, hours=hours)
        printed, size = capsys.readouterr().out, f"{at_the_end['n_layer']} × {at_the_end['n_embd']} "
        assert f"the best is the {end} that the law covers" in printed and f"or try {change} hours" in printed
        assert [size in line for line in printed.splitlines() if "<- best" in line] == [True]
    assert best_shape(day, CPU, hours="24") == shape
    small, large = (best_shape(day, card, hours=8)["n_layer"] for card in ("RTX 3090", "H100"))
    assert small < best_shape(day, "RTX 4090", hours=8)["n_layer"] < large
    with pytest.raises(UserError, match="card 'RTX4090' is not known; did you mean 'RTX 4090'"):
        best_shape(day, "RTX4090", hours=8)
    with pytest.raises(UserError, match="did you mean 'RTX 3090'"):
        best_shape(day, "3090", hours=8)
