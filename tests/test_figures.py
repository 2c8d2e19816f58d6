"""Numbers that the text quotes are those of the results that they come from, to the last digit that is quoted."""

import json
import re

import pandas as pd
import pytest
import torch
from conftest import ROOT

from machinery.budget import multiplying_and_flops
from machinery.forecast import forecast
from machinery.machine import DATASHEET_TFLOPS, Machine
from model_utils import count_parameters, expected_loss, flops_per_token, training_memory
from tools.bench.recipe import PLAIN, ours
from tools.runs import Results

NUMBER = r"([+-]?\d+(?:,\d{3})*(?:\.\d+)?)"
BENCH, DEMO, RECIPE, REHEARSAL = (
    f"results/{name}.md" for name in ("bench-intel-r-xeon-r-processor-2-threads", "demo", "recipe", "rehearsal")
)
AFTER_A_MILLION = f"| {PLAIN} | 1,000,000 | * | * | * | * | # |"
TOKENS = "results/bench-amd-epyc-2-threads.md"
EXPERIMENTS = "results/experiments.md"
DOCS, README, TEXT, OUTPUTS = "docs/benchmarks.md", "README.md", "the notebook", "the notebook's outputs"


def read(name: str) -> str:
    """A file or, after #, a section of it, the notebook's text and code, or what its cells printed, with single spaces
    and nothing bold.
    """
    if name in (TEXT, OUTPUTS):
        cells = json.loads((ROOT / "LMHarness.ipynb").read_text("utf-8"))["cells"]
        printed = [output.get("text", "") for cell in cells for output in cell.get("outputs", [])]
        parts = printed if name == OUTPUTS else [cell["source"] for cell in cells]
        text = "\n".join("".join(part) for part in parts)
    else:
        name, _, section = name.partition("#")
        text = (ROOT / name).read_text("utf-8")
        if section:
            text = text.split(f"\n### {section}\n")[1].split("\n###")[0]
    return " ".join(text.replace("**", "").split())


def numbers(name: str, sentence: str) -> list[str]:
    """The numbers at each # of the only such sentence in a text. A * is what stands there, within a cell of a table."""
    pattern = re.escape(sentence).replace(r"\#", NUMBER).replace(r"\*", "[^|]*?").replace("[^|]*?\\ ", "[^|]*?\\ ?")
    found = re.findall(pattern, read(name))
    assert len(set(found)) == 1, f"{name} has {len(set(found))} passages like {sentence!r}"
    return [found[0]] if isinstance(found[0], str) else list(found[0])


def rounded(value: float, quoted: str) -> str:
    """The value with as many digits, commas and signs as it is quoted with."""
    decimals = len(quoted.partition(".")[2])
    return f"{value:{'+' if quoted[0] == '+' else ''}{',' if ',' in quoted else ''}.{decimals}f}"


def assert_same(quoted: list[str], measured: list[float], where: str) -> None:
    assert quoted == [rounded(value, text) for text, value in zip(quoted, measured, strict=True)], where


# A text and its sentence, a source and the passage there, and what to multiply by
QUOTES = [
    (README, "held-out loss falls from # to", OUTPUTS, "demo-* from step 0 step 0 0 tokens 0 s # bits per", 1),
    (
        README,
        "held-out loss falls from * to # bits per byte",
        DEMO,
        '| `"python"`, the run of the picture | 0 | # |',
        1,
    ),
    (README, "falls from * to * bits per byte in # seconds", OUTPUTS, "finished: * tokens in # s,", 1),
    (README, "counting pairs of tokens gives #, `xz`", OUTPUTS, "by what followed the token before # bits", 1),
    (README, "counting pairs of tokens gives *, `xz` #. Slower", OUTPUTS, "packed by xz # bits per byte", 1),
    (TEXT, "Counting token pairs gives #, the", OUTPUTS, "by what followed the token before # bits", 1),
    (TEXT, "2.0, the compressor `xz` # (5.3)", OUTPUTS, "packed by xz # bits per byte", 1),
    (TEXT, "lines with the training text, `demo` too has # (6)", OUTPUTS, "0% to 5% of longer lines: * # bits", 1),
    (TEXT, "`demo`'s loss falls from # to * bits per byte", OUTPUTS, "all tokens alike # bits per byte", 1),
    (
        TEXT,
        "`demo`'s loss falls from * to # bits per byte",
        OUTPUTS,
        "when last evaluated: * nats per token, # bits",
        1,
    ),
    (TEXT, "Here, heads formed in # of # runs", EXPERIMENTS, "formed in # of # runs", 1),
    (DEMO, '`"python"`, the committed notebook | 0 | # |', OUTPUTS, "nats per token, # bits per byte a sample", 1),
    (DEMO, "the committed notebook | 0 | * | #M |", OUTPUTS, "finished: # tokens in", 1e-6),
    (DEMO, "the committed notebook | 0 | * | * | # |", OUTPUTS, "s, # tokens per second in the median step", 1),
    (DEMO, '`"python"` holds out # documents, # bytes', OUTPUTS, "val # documents * tokens # bytes", 1),
    (DOCS, "training step of `demo`, tokens/s | # |", BENCH, "| demo | LMHarness | * | # | 1.00 |", 1),
    (DOCS, "`transformers` as shipped: # | # × |", BENCH, "| demo | transformers, as shipped | * | # | # |", 1),
    (DOCS, "| | compiled, with fused AdamW: # | # × |", BENCH, "| demo | transformers, compiled, * | * | # | # |", 1),
    (DOCS, "x-transformers, compiled, * AdamW: # | # × |", BENCH, "| demo | x-transformers, * | * | # | # |", 1),
    (DOCS, "training step of a 22M model, tokens/s | # |", BENCH, "| 22M | LMHarness | * | # | 1.00 |", 1),
    (DOCS, "the same three: #, * | #,", BENCH, "| 22M | transformers, as shipped | * | # | # |", 1),
    (DOCS, "the same three: *, # and * | *, # and", BENCH, "| 22M | transformers, compiled, * | * | # | # |", 1),
    (DOCS, "the same three: * and # | *, * and # × |", BENCH, "| 22M | x-transformers, * | * | # | # |", 1),
    (DOCS, "peak memory, GB * | # |", BENCH, f"| 22M | LMHarness {'| * ' * 5}| # | 1.00 |", 1),
    (DOCS, "peak memory, GB * | * | #, * | #,", BENCH, f"| 22M | transformers, as shipped {'| * ' * 5}| # | # |", 1),
    (
        DOCS,
        "memory, GB * | * | *, # and * | *, # and",
        BENCH,
        f"| 22M | transformers, compiled, {'* | ' * 6}# | # |",
        1,
    ),
    (DOCS, "memory, GB * | * | * and # | *, * and # × |", BENCH, f"| 22M | x-transformers, {'* | ' * 6}# | # |", 1),
    (DOCS, "`demo`, float32 | # | `transformers`: # | # × |", BENCH, "| demo | float32 | 1 | # | # | # |", 1),
    (DOCS, "the same in bfloat16 | # | # | # × |", BENCH, "| demo | bfloat16 | 1 | # | # | # |", 1),
    (DOCS, "16 texts at a time, float32 | # | # | # × |", BENCH, "| demo | float32 | 16 | # | # | # |", 1),
    (DOCS, "46 MB, MB/s | # | tiktoken * | * |", TOKENS, "| 46 | LMHarness, files to shards | # |", 1),
    (DOCS, "46 MB, MB/s | * | tiktoken from memory to memory: # |", TOKENS, "| 46 | tiktoken, batch | # |", 1),
    (DOCS, "tiktoken from memory to memory: * | # × |", TOKENS, "| 46 | LMHarness, * | * | #% |", 0.01),
    (DOCS, "the same, 12 MB | # |", TOKENS, "| 12 | LMHarness, files to shards | # |", 1),
    (DOCS, "the same, 12 MB | * | # |", TOKENS, "| 12 | tiktoken, batch | # |", 1),
    (DOCS, "the same, 12 MB | * | * | # × |", TOKENS, "| 12 | LMHarness, * | * | #% |", 0.01),
    (DOCS, "waiting for data, of a training step | #% |", BENCH, "| demo | * | #% |", 1),
    (TEXT, "a minute, it held for # of # longer or different runs", "results/forecast.md", "fit: # of # ended", 1),
    (TEXT, "loss is # bits per byte (5.3) lower on Python and *", f"{RECIPE}#python", AFTER_A_MILLION, 1),
    (TEXT, "loss is * bits per byte (5.3) lower on Python and # on", f"{RECIPE}#english", AFTER_A_MILLION, 1),
    (README, "# bits per byte higher after a million tokens of Python", f"{RECIPE}#python", AFTER_A_MILLION, 1),
    (
        DOCS,
        "Muon: a step takes # ms, one of nanoGPT's recipe, with AdamW, # (",
        RECIPE,
        "the default # ms, * nanoGPT # ms",
        1,
    ),
    (DOCS, "on a 4090 # GB, where", REHEARSAL, "RTX 4090 | 1 | {} | bfloat16 | compiled | 16 | * | # |", 1),
    (DOCS, "the preflight predicted #.", REHEARSAL, "RTX 4090 | 1 | {} | bfloat16 | compiled | 16 | # |", 1),
]


@pytest.mark.parametrize(
    ("text", "sentence", "source", "passage", "factor"), QUOTES, ids=[quote[1] for quote in QUOTES]
)
def test_a_quoted_number_is_that_of_its_source(text, sentence, source, passage, factor):
    measured = [float(number.replace(",", "")) * factor for number in numbers(source, passage)]
    assert_same(numbers(text, sentence), measured, f"{text}: {sentence} / {source}: {passage}")


def sized(lm, preset: str, **overrides):
    """The config, and its model as shapes."""
    config = lm.Config.from_preset(preset, **overrides)
    return config, lm.outline(config, Machine.find("cpu", "float32"))[0]


def day_on(lm, card: str, hours: float) -> tuple[float, ...]:
    """Of `day` on a card at an MFU of 40%: tokens, tokens for each parameter, expected loss, bits per byte."""
    config, model = sized(lm, "day")
    parameters = count_parameters(model)["total"]
    tokens = 0.4e12 * DATASHEET_TFLOPS[card] * 3600 * hours / flops_per_token(model, config)
    forecasted = forecast(config, *multiplying_and_flops(config), tokens).middle
    return tokens, tokens / parameters, expected_loss(parameters, tokens), forecasted


# A text and its sentence, and how to compute its numbers
COMPUTED = [
    (README, "`day`: #M parameters, # hours", lambda lm: [_millions(lm, "day"), lm.Config.max_hours]),
    (README, "`demo`: #M, three minutes", lambda lm: [_millions(lm, "demo")]),
    (TEXT, "about # million parameters for a day", lambda lm: [round(_millions(lm, "day"), -1)]),
    (DOCS, "n_embd·block_size = # GFLOP", lambda lm: [flops_per_token(*reversed(sized(lm, "day"))) / 1e9]),
    (DOCS, "with N = #M. A 4090 does # TFLOP/s", lambda lm: [_millions(lm, "day"), DATASHEET_TFLOPS["RTX 4090"]]),
    (TEXT, "would end at a loss of about # with 1 hour, # with 6, # with 12, # with 24",
     lambda lm: [day_on(lm, "RTX 4090", hours)[2] for hours in (1, 6, 12, 24)]),
    (TEXT, "In `day`, sharing saves only #% of training memory",
     lambda lm: [100 - 100 * _bytes(lm) / _bytes(lm, attention="mha")]),
    ("docs/platforms.md", "# billion tokens at 40%", lambda lm: [day_on(lm, "RTX 4090", 24)[0] / 1e9]),
    ("docs/platforms.md", "Its # billion tokens", lambda lm: [day_on(lm, "H100", 24)[0] / 1e9]),
    *(
        (DOCS, f"| {hours} | # billion | # | # | # |",
         lambda lm, hours=hours: [day_on(lm, "RTX 4090", hours)[0] / 1e9, *day_on(lm, "RTX 4090", hours)[1:]])
        for hours in (1, 6, 12, 24)
    ),
]  # fmt: skip


def _millions(lm, preset: str) -> float:
    return count_parameters(sized(lm, preset)[1])["total"] / 1e6


def _bytes(lm, **overrides) -> float:
    """What `day` with overrides is predicted to take on a 4090."""
    config = lm.Config.from_preset("day", batch_tokens=524288, **overrides)
    shapes = lm.outline(config, Machine.find("cpu", "float32"))
    return sum(training_memory(*shapes, config, 16, torch.bfloat16).values())


@pytest.mark.parametrize(("text", "sentence", "compute"), COMPUTED, ids=[sentence for _, sentence, _ in COMPUTED])
def test_a_computed_number_is_that_of_the_formula(lm, text, sentence, compute):
    assert_same(numbers(text, sentence), compute(lm), f"{text}: {sentence}")


def test_the_losses_of_demo_are_those_of_its_runs():
    results = Results(ROOT / "results/recipe.jsonl")
    for text in ("python", "english"):
        *seeds, mean = numbers(DEMO, f'| `"{text}"` | # | # | # | # |')
        losses = [results.loss(ours(seed, 2_200_000, text)) for seed in range(3)]
        assert_same([*seeds, mean], [*losses, sum(losses) / 3], text)


# What the text claims of a single change of the recipe: the sentence, the row, its verdict
CLAIMS = [
    ("its `lr` as the best of three", "lr × 0.5", "worse"),
    ("its `lr` as the best of three", "lr × 2", "worse"),
    ("in our small models, the MLP did better on average", "MLP", "better"),
    (
        "In `demo`, a decay over half of the budget did better than a cosine or a decay over 20 or 80%",
        "cosine",
        "worse",
    ),
    (
        "In `demo`, a decay over half of the budget did better than a cosine or a decay over 20 or 80%",
        "wsd, decay 0.2",
        "worse",
    ),
    (
        "In `demo`, a decay over half of the budget did better than a cosine or a decay over 20 or 80%",
        "wsd, decay 0.8",
        "worse",
    ),
]


@pytest.mark.parametrize(("sentence", "row", "verdict"), CLAIMS)
def test_a_claim_about_the_recipe_is_what_its_row_says(sentence, row, verdict):
    assert sentence in read(TEXT) and re.search(
        rf"\| {re.escape(row)} \|[^\n]*\| {verdict} \|", (ROOT / RECIPE).read_text()
    )


def test_a_claim_about_an_experiment_is_what_its_table_says():
    losses = pd.read_csv(ROOT / "results/experiments/choices.csv").groupby("ffn").val_loss.mean()
    assert "in our small models, the MLP did better on average" in read(TEXT)
    assert 0 < losses["gated"] - losses["mlp"] < 0.1
    assert "shape matters too, though less than size" in read(TEXT)
    assert "shape is worth more than a quarter of that" in read(EXPERIMENTS)


def test_the_overrides_for_twice_the_depth_keep_the_size(lm):
    for preset, layers, ffn in (("demo", 8, 170), ("day", 32, 896)):
        assert f'`{{"n_layer": {layers}, "n_ffn": {ffn}}}` of `{preset}`' in read(README)
        twice = count_parameters(sized(lm, preset, n_layer=layers, n_ffn=ffn)[1])["total"]
        assert twice == pytest.approx(_millions(lm, preset) * 1e6, rel=0.01)
