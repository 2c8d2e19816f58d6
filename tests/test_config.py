"""Wrong input ends in one line that names both numbers and the way out, before anything is allocated."""

import json
from dataclasses import make_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from machinery.errors import UserError
from machinery.machine import Machine
from machinery.run_folder import portable
from machinery.settings import ConfigError, parse_overrides
from model_utils import count_parameters

WRONG = [
    ({"n_layr": 3}, ["n_layr", "n_layer"]),
    ({"n_embd": 65}, ["65", "4", "72"]),
    ({"n_embd": 65, "position": "none"}, ["65", "4", "68"]),
    ({"n_head": 4, "n_kv_head": 3}, ["n_head 4", "n_kv_head 3"]),
    ({"n_embd": 36, "n_head": 4}, ["36", "4", "even", "40"]),
    ({"batch_tokens": 1000}, ["1000", "64 × 4", "1024"]),
    ({"tokenizer": "gpt2"}, ["512", "50257", "50304"]),
    ({"tokenizer": "bytes", "vocab_size": 256}, ["256", "257"]),
    ({"position": "absolute", "n_position": 32}, ["32", "64"]),
    ({"n_layer": 0}, ["n_layer is 0"]),
    ({"n_ffn": -8}, ["n_ffn is -8"]),
    ({"lr": float("nan")}, ["lr is nan"]),
    ({"max_steps": 0}, ["no budget", "max_steps"]),
    ({"n_layer": "eight"}, ["'eight'", "int"]),
    ({"compile": 1}, ["compile is 1", "bool"]),
    ({"schedule": "cosin"}, ["cosin", "cosine"]),
    ({"warmup": 0.7, "decay": 0.7}, ["0.7", "whole budget"]),
    ({"val_fraction": 1.5}, ["1.5"]),
]
ODD = [
    {"norm_eps": float("nan")}, {"norm_eps": -1.0}, {"norm_eps": float("inf")}, {"rope_base": 1e-320},
    {"max_hours": 1e300}, {"max_hours": float("inf")}, {"block_size": 1 << 25, "batch_tokens": 1 << 25},
    {"n_position": 33_000_000}, {"source": "a\0b"}, {"n_layer": True}, {"lr": "fast"}, {"n_layer": 2.5},
    {"lr": 10**5000}, {"optimizer": 10**5000}, {"seed": -(10**5000)}, {"wandb": []}, {"schedule": {}},
    {"runs_dir": ""}, {"data_dir": "~no such user/x"},
]  # fmt: skip


def test_a_schedule_without_decay_may_warm_up_for_longer(lm):
    for schedule in ("cosine", "linear", "constant"):
        assert lm.Config.from_preset("demo", schedule=schedule, warmup=0.7).decay == 0.5


@pytest.mark.parametrize(("overrides", "named"), WRONG + [(overrides, []) for overrides in ODD])
def test_wrong_input_is_one_line_with_the_numbers(lm, overrides, named):
    with pytest.raises(ConfigError) as caught:
        lm.Config.from_preset("smoke", **overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in [next(iter(overrides)), *named]), message


def test_unknown_preset_and_variant_name_the_nearest(lm):
    with pytest.raises(ConfigError, match="'demos' is not known; did you mean 'demo'"):
        lm.Config.from_preset("demos")
    with pytest.raises(ConfigError, match="position 'ropes' is not known; did you mean 'rope'.*docs/changing.md"):
        lm.build_model(lm.Config.from_preset("smoke", position="ropes"))


def test_folders_below_home_are_paths_for_whoever_takes_them(lm, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = lm.Config.from_preset("smoke", runs_dir="~/runs", data_dir=Path("~/data"))
    assert [config.runs_dir, config.data_dir] == [str(tmp_path / "runs"), str(tmp_path / "data")]
    assert config.run_name == lm.Config.from_preset("smoke").run_name
    assert portable(config.to_dict())["runs_dir"] == "…/runs"


@pytest.mark.parametrize("missing", [f"cuda:{torch.cuda.device_count()}", "cpu:abc"])
def test_missing_device_is_named(missing):
    with pytest.raises(UserError, match=f"device is '{missing}' but this machine has.*cpu"):
        Machine.find(missing)


def test_gqa_with_too_many_kv_heads_and_mha_ignores_them(lm):
    with pytest.raises(ConfigError, match="n_kv_head 8"):
        lm.Config.from_preset("smoke", n_kv_head=8)
    lm.Config.from_preset("smoke", attention="mha", n_kv_head=8)


def test_config_is_frozen_and_round_trips_through_json(lm):
    config = lm.Config.from_preset("demo", lr=1, n_layer=3)
    assert lm.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(AttributeError):
        config.n_layer = 5


def test_run_name_follows_what_defines_the_run(lm):
    name = lm.Config.from_preset("demo").run_name
    assert lm.Config.from_preset("demo", max_hours=1.0, eval_every=7, micro_batch=4).run_name == name
    assert lm.Config.from_preset("demo", lr=0.01).run_name != name
    assert lm.Config.from_preset("demo", position="none").run_name != name
    assert lm.Config.from_preset("demo", run_name="mine").run_name == "mine"
    own = make_dataclass("Own", [("smooth", float, 0.5)], bases=(lm.Config,), frozen=True)
    assert own.from_preset("demo").run_name != own.from_preset("demo", smooth=0.1).run_name


def test_every_field_is_commented():
    """Each field of the configuration has a comment on its line, the three budgets share one."""
    import nbformat

    from machinery.notebook import NOTEBOOK

    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if "Fields:" in cell.source and "define" in cell.metadata.get("tags", []):
            for line in cell.source.splitlines():
                if ": " in line and " = " in line and not line.startswith(("#", "@", "class")):
                    assert "  # " in line, line


def test_day_has_about_220_million_parameters(lm):
    with torch.device("meta"):
        model = lm.build_model(lm.Config.from_preset("day"))
    assert 215e6 <= count_parameters(model)["total"] <= 225e6


def test_errors_are_one_line_in_ipython(lm):
    assert ConfigError("so it is")._render_traceback_() == ["ConfigError: so it is"]


def test_what_is_meant_is_taken_and_the_rest_is_one_line(lm):
    """YAML, and people, write numbers in more ways than Python."""
    text = "{lr: 1e-3, wandb: off, n_layer: 3.0, seed: 010, compile: no, run_name: 010, micro_batch: 4}"
    for overrides in (
        parse_overrides(text),
        {"lr": "1e-3", "wandb": False, "n_layer": 3.0, "seed": 10, "compile": "no"},
    ):
        config = lm.Config.from_preset("smoke", **overrides)
        assert (config.lr, config.wandb, config.n_layer, config.seed, config.compile) == (1e-3, "off", 3, 10, False)
        assert type(config.n_layer) is int
    assert parse_overrides("") == parse_overrides(None) == parse_overrides("{}") == {}
    quoted = {"prompt": "null", "source": "~", "val_source": ""}
    assert parse_overrides("{prompt: 'null', source: '~', val_source: ''}") == quoted
    for value in ("OFF", "false", "no", "off", False):
        assert lm.Config.from_preset("smoke", wandb=value).wandb == "off"
    assert lm.Config.from_preset("smoke", schedule=" Cosine").schedule == "cosine"
    arrays = {"lr": np.float64(0.5), "n_layer": np.int64(3), "compile": np.False_, "source": Path("texts")}
    config = lm.Config.from_preset("smoke", **arrays)
    assert [config.lr, config.n_layer, config.compile, config.source] == [0.5, 3, False, "texts"]
    assert lm.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for wrong in (None, [], 3, "n_layer"):
        with pytest.raises(ConfigError, match="a configuration is"):
            lm.Config.from_dict(wrong)
    for wrong in ("[a, b]", "{n_layer: 2", "n_layer", ["a"], 3):
        with pytest.raises(ConfigError, match="overrides.* write"):
            parse_overrides(wrong)


@pytest.mark.parametrize(
    "text, named",
    [
        ("{n_layer: 2, n_layer: 3}", "a name twice"), ("{n_layer:3}", "'n_layer:3' as a name"),
        ("{batch_tokens: 16,384}", "no comma in a number"), ("{preset: demo}", "preset is a knob of its own"),
        ("{max_tokens: 10,000,000}", "no comma in a number"),
        ("{source: *.txt}", "source: '*.txt'"), ("{source: &a [x, x], prompt: [*a, *a]}", "refer to a value by *"),
        ("[&a [x], *a]", "refer to a value by *"), ("[" * 2000, "recursion"), ("{1: 2}", "'1' as a name"),
        ("{prompt: null}", "prompt is null in overrides"), ('{"prompt": null}', "to leave it empty, write ''"),
        ("{val_source: ~, n_layer: 2}", "val_source is ~ in overrides"), ("{cls: 1}", "field 'cls' is not known"),
    ],
)  # fmt: skip
def test_overrides_that_say_something_else_are_one_line(text, named):
    with pytest.raises(ConfigError) as caught:
        parse_overrides(text)
    assert named in str(caught.value) and "\n" not in str(caught.value)
