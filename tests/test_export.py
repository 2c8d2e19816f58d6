"""Models and tokenizers leave and come back: `transformers` computes the same from the files, and nothing is lost."""

import errno
import json
import os
import random
import shutil
import stat
import sys
from itertools import islice, product

import pytest
import tiktoken
import tokenizers
import torch
import transformers
from conftest import LM
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_data import TOKENIZERS

from data_utils import get_tokenizer
from machinery.checkpoints import take_checkpoint
from machinery.errors import DataError, UserError
from machinery.huggingface import weights
from machinery.huggingface.families import FAMILIES, ExportError, family_of, to_hf_config
from machinery.huggingface.tokenizers import (
    read_tokenizer,
    save_tokenizer,
    to_tokenizers,
)
from machinery.huggingface.weights import MARK, config_from_hf, export_hf, import_hf
from machinery.sources import iter_documents
from machinery.tokenizers import tokenizer_to_dict

BYTES = get_tokenizer("bytes", 257)
ENVIRONMENT = {"commit": "abc123", "device": "a CPU", "dtype": "float32", "versions": {"torch": "2.13.0"}}


def settings_of(family):
    """The overrides that a row of the table stands for."""
    kv = {"any": {"attention": "gqa", "n_kv_head": 2}, "mha": {"attention": "mha"}, "mqa": {"n_kv_head": 1}}
    return {name: getattr(family, name) for name in ("position", "ffn", "norm", "qk_norm")} | kv[family.attention]


def make_run(folder, config):
    """A run directory whose weights are far from their initial values, and the model in it."""
    model = LM.build_model(config)
    with torch.no_grad():  # gains other than one, biases other than zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder.mkdir(parents=True)
    files = [("config", config.to_dict()), ("tokenizer", tokenizer_to_dict(BYTES)), ("environment", ENVIRONMENT)]
    for name, value in files:
        (folder / f"{name}.json").write_text(json.dumps(value))
    scores = {"val_loss": 3.25, "val_bpb": 1.5, "val_tokens": 18304}
    state = {"step": 20, "tokens": 5120, "seconds": 1.5, "scores": scores}
    take_checkpoint(folder, model, [], state, keep=1)()
    return model


def exported(tmp_path, tiny, **overrides):
    config = tiny(**{"block_size": 80, "batch_tokens": 320} | overrides)
    model = make_run(tmp_path / "run", config)
    return config, model, export_hf(tmp_path / "run", tmp_path / "out")


CASES = [(family, {"tie_embeddings": tied}) for family in FAMILIES for tied in (True, False)] + [
    (family, change)
    for family in FAMILIES
    if family.position == "rope"
    for change in (
        {"n_kv_head": 1, "rope_base": 500.0},
        {"n_head": 8, "n_kv_head": 2},
        {"attention": "mha"},
        {"induction": True},
    )
]
CASES += [
    (FAMILIES[0], {"rope_base": 500000.0, "norm_eps": 1e-6}),
    (FAMILIES[1], {"rope_base": 500000.0, "norm_eps": 1e-6, "n_embd": 96, "n_head": 6, "n_kv_head": 3}),
    (FAMILIES[0], {"n_position": 128}),
    (FAMILIES[8], {"n_position": 128, "norm_eps": 1e-6}),
    (FAMILIES[8], {"induction": True}),  # without rotary positions nothing has biases
]


@pytest.mark.parametrize("tied", [True, False])
def test_a_normalised_embedding_leaves_as_a_table_of_unit_rows(lm, tiny, tmp_path, tied):
    config, model, out = exported(tmp_path, tiny, embedding_norm=True, tie_embeddings=tied, norm_eps=1e-6)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.config.model_type == "qwen3" and not theirs.config.tie_word_embeddings
    tokens = torch.randint(0, 256, (2, config.block_size), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, logits = model(tokens), theirs(tokens).logits
    assert (ours - logits).norm() / ours.norm() < 1e-5
    values, state = import_hf(out)
    again = lm.build_model(tiny(**values | {"batch_tokens": 4 * config.positions}))
    again.load_state_dict(state)
    with torch.no_grad():
        assert (again(tokens) - ours).norm() / ours.norm() < 1e-5
    with pytest.raises(UserError, match="embedding_norm"):
        import_hf(out, config.to_dict() | {"tie_embeddings": False})


@pytest.mark.parametrize(
    ("family", "change"), CASES, ids=[f"{f.model_type}-{'-'.join(map(str, c.values()))}" for f, c in CASES]
)
def test_transformers_computes_the_same_and_the_way_back_is_exact(lm, tiny, tmp_path, family, change):
    config, model, out = exported(tmp_path, tiny, **settings_of(family) | change)
    theirs, loaded = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loaded[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.model_type == family.model_type == family_of(config.to_dict()).model_type
    tokens = torch.randint(0, 256, (2, config.block_size), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, logits = model(tokens), theirs(tokens).logits
    assert (ours - logits).abs().max() < 1e-4
    assert (ours - logits).norm() / ours.norm() < 1e-5 and (ours - logits).abs().max() < 1e-5 * ours.abs().max()
    if change == {"tie_embeddings": True}:  # their cache and positions, once for each family
        theirs.generation_config.eos_token_id = None  # an untrained model may well write it
        mask = torch.ones_like(tokens[:, :16])
        written = theirs.generate(tokens[:, :16], attention_mask=mask, max_new_tokens=64, do_sample=False)
        assert torch.equal(written, lm.generate(model, tokens[:, :16], 64, temperature=0))

    values, state = import_hf(out)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert set(state) == set(model.state_dict())
    unused = {"rope_base", "induction"} if config.position != "rope" else set()
    for name in set(values) - {"block_size", "n_kv_head", "attention"} - unused:
        assert values[name] == getattr(config, name), name
    assert values["block_size"] == config.positions
    assert values["n_kv_head"] == model.blocks[0].attention.K
    again = tiny(**values | {"batch_tokens": 4 * config.positions})
    copy = lm.build_model(again)
    copy.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(copy(tokens), ours)
    import_hf(out, config.to_dict())  # the config that it came from fits


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[8]], ids=lambda family: family.model_type)
def test_export_of_an_import_is_the_same_files(tiny, tmp_path, family):
    config, _, out = exported(tmp_path, tiny, **settings_of(family))
    values, state = import_hf(out)
    again = tiny(**values | {"batch_tokens": 320})
    model = make_run(tmp_path / "again", again)
    model.load_state_dict(state)
    take_checkpoint(tmp_path / "again", model, [], {"step": 21}, keep=1)()
    second = export_hf(tmp_path / "again", tmp_path / "second")
    for path in out.iterdir():
        if path.name not in ("README.md", MARK):
            assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_every_combination_exports_or_names_the_part_in_the_way(lm, tiny):
    parts = {"position": lm.POSITIONS, "ffn": lm.FFNS, "norm": lm.NORMS, "qk_norm": (False, True)}
    mapped = {tuple(getattr(family, part) for part in parts) for family in FAMILIES}
    for choice in product(*parts.values()):
        config = tiny(attention="mha", **dict(zip(parts, choice))).to_dict()
        if choice in mapped:
            family_of(config)
            continue
        with pytest.raises(ExportError) as caught:
            family_of(config)
        named = str(caught.value).split()[0]
        assert named in parts and repr(config[named]) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ExportError, match="attention 'gqa' with 2 key/value heads .*of 4 key/value .*of 1 key/value"):
        family_of(tiny(position="absolute", ffn="mlp", norm="layer", qk_norm=False).to_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "value"}, "attention 'value' .*; 'mha' or 'gqa' has$"),
        ({"attention": "window", "position": "none", "ffn": "mlp"}, "attention 'window' .*; 'mha' or 'gqa' has$"),
        ({"position": "absolute", "ffn": "gated", "norm": "rms"}, "position 'absolute' .*there is one with position"),
        ({"position": "none", "norm": "layer", "qk_norm": False}, "norm 'layer' .*position 'rope', or with norm 'rms'"),
        (
            {"position": "none", "ffn": "mlp", "norm": "layer"},
            "position 'none' .* there is one with position 'rope' and",
        ),
    ],
    ids=str,
)
def test_the_part_in_the_way_is_the_one_whose_change_is_enough(tiny, change, message):
    with pytest.raises(ExportError, match=message):
        family_of(tiny(**change).to_dict())


def test_every_change_that_is_offered_works(lm, tiny):
    """Follow the advice of each refusal, and the model exports."""
    for position, ffn, norm in product(lm.POSITIONS, lm.FFNS, lm.NORMS):
        for qk_norm, n_kv_head in product((False, True), (1, 2, 4)):
            config = tiny(position=position, ffn=ffn, norm=norm, qk_norm=qk_norm, n_kv_head=n_kv_head).to_dict()
            try:
                family_of(config)
                continue
            except ExportError as error:
                offers = str(error).split("there is one with ")[1].split(", or with ")
            for offer in offers:
                change = {}
                for part in offer.split(" and "):
                    name, value = part.split(" ", 1)
                    if name == "attention":
                        change["n_kv_head"] = int(value.split()[1])
                    else:
                        change[name] = value == "True" if name == "qk_norm" else value.strip("'")
                family_of(config | change)


def test_a_refused_model_leaves_nothing_behind(tiny, tmp_path):
    make_run(tmp_path / "run", tiny(position="none", qk_norm=True))
    with pytest.raises(ExportError, match="qk_norm True .*position 'none'"):
        export_hf(tmp_path / "run", tmp_path / "out")
    make_run(tmp_path / "good", tiny())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="mine holds other things"):
        export_hf(tmp_path / "good", tmp_path / "mine")
    shutil.rmtree(tmp_path / "good" / "checkpoints")
    with pytest.raises(ExportError, match="no checkpoint"):
        export_hf(tmp_path / "good", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "mine", "run"]


@pytest.fixture
def refused_target(tiny, tmp_path):
    """refused_target(make): `make(folder)` fills a folder, which an export must leave as it is."""
    make_run(tmp_path / "run", tiny())

    def check(make, match, target=None):
        folder = tmp_path / "target"
        make(folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(ExportError, match=match) as caught:
            export_hf(tmp_path / "run", target or folder)
        assert "\n" not in str(caught.value)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "target"]

    return check


def test_a_base_model_is_not_replaced(refused_target, tiny):
    def make(folder):
        made = transformers.AutoModelForCausalLM.from_config(to_hf_config(tiny(tokenizer="bytes").to_dict()))
        made.save_pretrained(folder)
        save_tokenizer(BYTES, folder, 100)

    refused_target(make, "holds other things than an export.*no lmharness.json")


@pytest.mark.parametrize("what", ["card", "note", "weights", "folder"])
def test_an_export_that_its_user_changed_is_not_replaced(refused_target, tmp_path, what):
    def make(folder):
        export_hf(tmp_path / "run", folder)
        if what == "card":
            (folder / "README.md").write_text("# My model")
        elif what == "note":
            (folder / "notes.txt").write_text("mine")
        elif what == "folder":
            (folder / "mine").mkdir()
        else:
            tensors = load_file(folder / "model.safetensors")
            save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors")

    refused_target(make, "holds other things")


@pytest.mark.parametrize("mark", ["{}", "[]", '{"files": [1]}', '{"files": "x"}', '{"files": {"README.md": 3}}', "x"])
def test_a_mark_that_is_not_ours_does_not_open_a_folder(refused_target, mark):
    def make(folder):
        folder.mkdir()
        (folder / MARK).write_text(mark)  # somebody's own, which may be all there is
        if "README.md" in mark:
            (folder / "README.md").write_text("mine")

    refused_target(make, "target holds other things than an export as it was written .*; choose another folder")


def test_the_folder_one_is_in_is_not_replaced(refused_target, tmp_path, monkeypatch):
    def make(folder):
        folder.mkdir()
        monkeypatch.chdir(folder)

    refused_target(make, "is the folder you are in", target=".")


def test_a_file_is_not_replaced(tiny, tmp_path):
    make_run(tmp_path / "run", tiny())
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("a" * 300), f"{tmp_path}/a\0b"):
        with pytest.raises(ExportError) as caught:
            export_hf(tmp_path / "run", target)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_leads_to_the_folder_that_is_written(tiny, tmp_path):
    make_run(tmp_path / "run", tiny())
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "there").mkdir()
    for _ in range(2):  # into an empty folder, then over an export
        export_hf(tmp_path / "run", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / MARK).exists()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "there").iterdir()}
    assert modes == {stat.S_IMODE((tmp_path / "run" / "config.json").stat().st_mode)}


def test_an_export_that_fails_leaves_the_earlier_one(tiny, tmp_path, monkeypatch):
    make_run(tmp_path / "run", tiny())
    out = export_hf(tmp_path / "run", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match=r"out: .*No space left on device.*make room on its disk"):
        export_hf(tmp_path / "run", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_an_export_that_is_changed_while_it_is_replaced_is_kept(tiny, tmp_path, monkeypatch):
    make_run(tmp_path / "run", tiny())
    out = export_hf(tmp_path / "run", tmp_path / "out")

    def save(*arguments):
        (out / "notes.txt").write_text("mine")
        save_tokenizer(*arguments)

    monkeypatch.setattr("machinery.huggingface.weights.save_tokenizer", save)
    with pytest.raises(ExportError, match="out holds other things than an export as it was written"):
        export_hf(tmp_path / "run", out)
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("content", [None, "[]", "x", '{"versions": [1], "device": {}}'])
def test_a_missing_note_does_not_forbid_an_export(tiny, tmp_path, content):
    make_run(tmp_path / "run", tiny())
    path = tmp_path / "run" / "environment.json"
    path.unlink() if content is None else path.write_text(content)
    assert "unknown" in (export_hf(tmp_path / "run", tmp_path / "out") / "README.md").read_text()


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[8]], ids=lambda family: family.model_type)
def test_padded_batches_write_what_single_prompts_do(tiny, tmp_path, family):
    _, _, out = exported(tmp_path, tiny, **settings_of(family))
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == 256
    prompts = ["import os", "def", "class Größe:"]
    assert tokenizer(prompts, padding=True, return_tensors="pt").input_ids.shape == (3, 14)
    settings = {"do_sample": False, "max_new_tokens": 12, "return_full_text": False}
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    single = [pipe(prompt, **settings)[0]["generated_text"] for prompt in prompts]
    assert [found[0]["generated_text"] for found in pipe(prompts, batch_size=2, **settings)] == single


def test_card_and_settings_for_generation(tiny, tmp_path):
    config, _, out = exported(tmp_path, tiny)
    card = (out / "README.md").read_text()
    stated = ["python", "muon", "lr 0.02", "5,120 in 20 steps", "val_loss 3.25", "val_tokens 18,304", "commit abc123"]
    stated.append("1.00%: whole documents, or the ends of them")  # which of the two, a run does not keep
    assert all(part in card for part in stated), card
    source = json.loads((tmp_path / "run/config.json").read_text()) | {"source": "a\n\n# b | c"}
    (tmp_path / "run/config.json").write_text(json.dumps(source))
    assert r"| data | a\n\n# b \| c |" in (export_hf(tmp_path / "run", tmp_path / "other") / "README.md").read_text()
    assert str(tmp_path) not in "".join(
        path.read_text() for path in out.glob("*.[jm]*") if path.suffix != ".safetensors"
    )
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == generation.bos_token_id == 256
    assert export_hf(tmp_path / "run", out) == out  # an export is replaced


def test_shards_of_the_library_come_back(tiny, tmp_path):
    _, model, out = exported(tmp_path, tiny, tie_embeddings=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    shutil.rmtree(out)
    theirs.save_pretrained(out, max_shard_size="40KB")
    assert len(list(out.glob("*.safetensors"))) > 2
    _, state = import_hf(out)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# ----------------------------------------------------------------------------------------------- coming in

ODD = [  # a family, what somebody's config.json says, and what is told
    (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        "rope_parameters.*linear",
    ),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_parameters.*linear"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is gelu"),
    ("llama", {"head_dim": 16}, "head_dim is 16.* 8"),
    ("llama", {"model_type": "mixtral"}, "model_type 'mixtral' is not one of llama"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"auto_map": {"AutoModel": "evil.py"}}, "auto_map"),
    ("llama", {"hidden_size": 1 << 40}, "hidden_size is 1099511627776"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ("llama", {"num_labels": 10**6}, "num_labels is 1000000"),
    ("llama", {"num_attention_heads": 3}, "refused by transformers"),
    ("llama", {"num_hidden_layers": 3}, r"model.layers.2.* is missing there, \("),
    ("llama", {"num_hidden_layers": 1}, r"model.layers.1.* there, not here"),
    ("llama", {"vocab_size": 300}, r"model.embed_tokens.weight is \(257, 32\) there and \(300, 32\)"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "layer_types|sliding_window"),
    ("qwen3", {"head_dim": 16}, "head_dim is 16"),
    ("stablelm", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "rope_parameters.*0.25"),
    ("stablelm", {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_theta": 1e4}}, "rope_parameters.*0.5"),
    ("llama", {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_theta": 1e4}}, "rope_parameters.*0.5"),
    ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual is True"),
    ("starcoder2", {"sliding_window": 8}, "sliding_window is 8"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", {"activation_function": "relu"}, "activation_function is relu"),
    ("apertus", {"hidden_act": "xielu"}, "hidden_act is xielu"),
    ("llama", {"rope_parameters": {"rope_theta": "abc", "rope_type": "default"}}, "config.json: "),
    ("llama", {"rope_parameters": {"rope_theta": 0, "rope_type": "default"}}, "rope_base is 0; it must be"),
    ("llama", {"rope_parameters": 3}, "config.json: "),
    ("llama", {"rms_norm_eps": float("nan")}, "norm_eps is nan; it must be"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0; it must be"),
    ("llama", {"num_key_value_heads": 0}, "num_key_value_heads is 0; it must be"),
    ("llama", {"num_key_value_heads": 3}, "config.json: "),
    ("llama", {"hidden_size": "64"}, "hidden_size is '64'; it must be"),
    ("llama", {"num_hidden_layers": 4096}, "4096 layers and the weights 20 tensors"),
    ("llama", {"model_type": ["llama"]}, "model_type"),
]


def family_called(model_type):
    return next(family for family in FAMILIES if family.model_type == model_type)


@pytest.mark.parametrize(("model_type", "change", "named"), ODD, ids=[f"{model}-{change}" for model, change, _ in ODD])
def test_what_this_stack_does_not_have_is_named(tiny, tmp_path, model_type, change, named):
    _, _, out = exported(tmp_path, tiny, **settings_of(family_called(model_type)))
    path = out / "config.json"
    values = {name: value for name, value in json.loads(path.read_text()).items() if name != "layer_types"}
    path.write_text(json.dumps(values | change))
    with pytest.raises(ExportError, match=named) as caught:
        import_hf(out)
    assert "\n" not in str(caught.value) and str(out) in str(caught.value)


@pytest.mark.parametrize(
    "index",
    [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 3}}, {"weight_map": {"a": ["b"]}}],
    ids=str,
)
def test_an_index_of_no_files_is_one_line(tiny, tmp_path, index):
    _, _, out = exported(tmp_path, tiny)
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match=f"{out}.*does not say which file holds each tensor"):
        import_hf(out)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_bigcode", "starcoder2"])
def test_biases_are_refused_unless_zero(tiny, tmp_path, model_type):
    _, _, out = exported(tmp_path, tiny, **settings_of(family_called(model_type)), induction=True)
    weights = load_file(out / "model.safetensors")
    name = next(name for name in weights if name.endswith("c_proj.bias"))
    assert not weights[name].any()
    weights[name][3] = 0.5
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=f"{name} is a bias that is not zero"):
        import_hf(out)


def test_a_name_of_weights_that_no_file_can_have_is_one_line(tiny, tmp_path):
    _, _, out = exported(tmp_path, tiny)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "z" * 5000}}))
    with pytest.raises(ExportError, match="not readable .File name too long"):
        import_hf(out)


def test_damaged_and_missing_files_are_one_line(tiny, tmp_path):
    _, _, out = exported(tmp_path, tiny)
    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(ExportError, match="not readable"):
        import_hf(out)
    (out / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="safetensors only"):
        import_hf(out)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../run/config.json"}}))
    with pytest.raises(ExportError, match="names of files beside it"):
        import_hf(out)
    (out / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds list"):
        import_hf(out)
    with pytest.raises(ExportError, match="neither a folder here nor"):
        import_hf(tmp_path / "nowhere")


def test_training_begins_with_a_checkpoint(lm, tiny, tmp_path, texts, capsys):
    _, model, out = exported(tmp_path, tiny, tie_embeddings=False, rope_base=500.0)
    here = {"runs_dir": str(tmp_path / "runs"), "data_dir": str(tmp_path / "data"), "run_name": "on"}
    here |= {"source": texts[0], "val_fraction": 0.2, "batch_tokens": 320, "max_steps": 3, "eval_every": 3}
    still = {"lr": 1e-9, "embedding_lr": 1e-9, "head_lr": 1e-9, "weight_decay": 0.0}
    config = lm.Config.from_preset("smoke", **config_from_hf(out) | here | still)
    assert lm.train(config)["steps"] == 3
    _, trained, encoding = lm.load_run(tmp_path / "runs" / "on")
    for ours, begun in zip(trained.parameters(), model.parameters()):
        assert torch.allclose(ours, begun, atol=1e-6)  # the rate is as good as zero
    assert encoding.encode_ordinary("Größe") == BYTES.encode_ordinary("Größe")
    for path in out.glob("*.safetensors"):
        path.unlink()  # not needed to go on
    assert lm.train(lm.replace(config, max_steps=4))["steps"] == 4
    with pytest.raises(UserError, match="init_from is '' but run 'on' was begun with"):
        lm.train(lm.replace(config, init_from=""))


def test_a_block_that_computes_otherwise_is_no_export(lm, tiny, tmp_path, texts, monkeypatch):
    class Parallel(lm.Block):
        def forward(self, x, position, cache=None, tokens=None):
            return super().forward(x, position, cache, tokens) + self.ffn(x)

    class Scaled(lm.Block):
        def __init__(self, config, layer):
            super().__init__(config, layer)
            self.scale = torch.nn.Parameter(torch.ones(()))

    _, _, out = exported(tmp_path, tiny, vocab_size=300)
    monkeypatch.setattr(lm, "Block", Parallel)
    monkeypatch.setitem(sys.modules, "LMHarness", lm)
    with pytest.raises(ExportError, match=r"logits of qwen3 differ from this stack's by up to \d"):
        export_hf(tmp_path / "run", tmp_path / "other")
    monkeypatch.setattr(lm, "Block", Scaled)
    here = {"runs_dir": str(tmp_path / "runs"), "data_dir": str(tmp_path / "data"), "source": texts[0]}
    values = config_from_hf(out) | here | {"batch_tokens": 320, "val_fraction": 0.2}
    with pytest.raises(ExportError, match="blocks.0.scale is only in the model; for classes with other weights"):
        lm.train(lm.Config.from_preset("smoke", **values))


@pytest.mark.parametrize("position", ["absolute", "none"])
def test_what_a_position_does_not_use_may_differ(lm, tmp_path, position):
    values = lm.Config.from_preset("smoke", position=position).to_dict()
    weights._check_same(tmp_path, values, values | {"rope_base": 500.0, "induction": True})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_layer": 3}, "n_layer is 3 but 2"),
        ({"rope_base": 100.0}, "rope_base is 100.0 but 500.0"),
        ({"qk_norm": False}, "qk_norm is False but True"),
        ({"n_kv_head": 1}, "n_kv_head is 1 but 2"),
        ({"tokenizer": "bpe"}, "tokenizer 'bpe'.*set tokenizer to that folder"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_its_checkpoint_is_one_line(lm, tiny, tmp_path, texts, change, named):
    _, _, out = exported(tmp_path, tiny, rope_base=500.0, vocab_size=300)
    values = config_from_hf(out) | {"batch_tokens": 320, "source": texts[0], "val_fraction": 0.2, "run_name": "off"}
    values |= {"runs_dir": str(tmp_path / "runs"), "data_dir": str(tmp_path / "data")}
    with pytest.raises(ExportError, match=named):
        lm.train(lm.Config.from_preset("smoke", **values | change))
    (out / "tokenizer.json").unlink()
    if change == {"tokenizer": "bpe"}:
        with pytest.raises(ExportError, match="has no tokenizer.json, and ids of a 'bpe'"):
            lm.train(lm.Config.from_preset("smoke", **values | change))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "model.norm.weight",
            lambda weights: weights["model.norm.weight"].to(torch.int8),
            "model.norm.weight holds int8",
        ),
        (
            "model.norm.weight",
            lambda weights: 1e300 * weights["model.norm.weight"].double(),
            "model.norm.weight holds values that are not finite in float32",
        ),
        ("lm_head.weight", lambda weights: 2 * weights["model.embed_tokens.weight"], "differs from the embedding"),
        ("lm_head.weight", lambda weights: weights["model.embed_tokens.weight"].clone(), None),
    ],
)
def test_weights_that_are_not_what_their_config_says_are_one_line(tiny, tmp_path, name, change, message):
    """`transformers` ties no head that is in the file with other values, whatever config.json says."""
    _, model, out = exported(tmp_path, tiny)
    weights = load_file(out / "model.safetensors")
    save_file(weights | {name: change(weights)}, out / "model.safetensors")
    if message:
        with pytest.raises(ExportError, match=message):
            import_hf(out)
    else:
        assert all(torch.equal(tensor, import_hf(out)[1][name]) for name, tensor in model.state_dict().items())


def test_the_folder_of_a_run_is_not_begun_with(tiny, tmp_path):
    exported(tmp_path, tiny)
    with pytest.raises(ExportError, match="export_hf makes such a checkpoint of a run"):
        import_hf(tmp_path / "run")


@pytest.mark.parametrize(
    "change",
    [{"n_head": 0}, {"n_kv_head": 0}, {"n_layer": "2"}, {"rope_base": "abc"}, {"n_ffn": None}, {"position": []}]
    + [{"sample_tokens": "x"}, {"val_fraction": None}, {"tie_embeddings": 3}, {"n_layer": 4096}, {"attention": None}],
    ids=str,
)
def test_an_odd_run_is_one_line(tiny, tmp_path, change):
    make_run(tmp_path / "run", tiny())
    path = tmp_path / "run" / "config.json"
    values = json.loads(path.read_text())
    for odd in (values | change, {name: value for name, value in values.items() if name not in change}):
        path.write_text(json.dumps(odd))
        with pytest.raises(ExportError, match="config.json") as caught:
            export_hf(tmp_path / "run", tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_tokenizer_of_a_larger_model_is_one_line(lm, tiny, tmp_path):
    make_run(tmp_path / "run", tiny())
    other = tokenizer_to_dict(BYTES) | {"special_tokens": {"<|endoftext|>": 299}}
    (tmp_path / "run/tokenizer.json").write_text(json.dumps(other))
    for read in (lm.load_run, lambda run: export_hf(run, tmp_path / "out")):
        with pytest.raises(UserError, match="tokenizer.json has 300 tokens and the model of this run 257 rows"):
            read(tmp_path / "run")


@pytest.mark.parametrize("device", ["meta", "cpu:abc", None, 3])
def test_a_device_that_holds_no_weights_is_one_line(lm, tiny, tmp_path, device):
    make_run(tmp_path / "run", tiny())
    with pytest.raises(UserError, match=f"device {device!r}: .*'cpu' and Machine"):
        lm.load_run(tmp_path / "run", device)


@pytest.mark.skipif(os.name == "nt", reason="there are no such pipes there")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_pipe_is_not_waited_for(tiny, tmp_path, name):
    _, _, out = exported(tmp_path, tiny)
    (out / name).unlink(missing_ok=True)
    os.mkfifo(out / name)
    with pytest.raises(UserError, match="not a regular file|is missing"):
        read_tokenizer(out) if name == "tokenizer.json" else import_hf(out)


# ---------------------------------------------------------------------------------------------- tokenizers

DOCUMENTS = list(islice(iter_documents("python"), 120))
PIECES = [
    "<|endoftext|>",
    "<|",
    "\r\n",
    "\n\n",
    "   ",
    "\t\t",
    " \n ",
    "I'LL",
    "'ſ",
    "we'Ve",
    "1234567",
    "٣٤٥",
    "  \u3000",
]
PIECES += [
    "👩‍👩‍👧",
    "é",
    "e\u0301",
    "नमस्ते",
    "中文字",
    "<div>",
    "!=",
    "...",
    "\x00",
    "\u200d",
    "ß",
    "İ",
    "\u2028",
    "\x85",
    "$",
    "::",
]
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.tuples(st.integers(0, len(DOCUMENTS) - 1), st.integers(0, 5000), st.integers(0, 120)).map(
        lambda t: DOCUMENTS[t[0]][t[1] : t[1] + t[2]]
    ),
    st.text(" \n\t\r\u00a0'sS1aA\u0301.!", max_size=30),
)
KINDS = TOKENIZERS | {"bpe": lambda: get_tokenizer("bpe", 2000, DOCUMENTS)}


@pytest.fixture(scope="module", params=KINDS, name="leaving")
def _leaving(request, tmp_path_factory):
    """A tokenizer, the folder it was saved in, and what `transformers` and `tokenizers` load from there."""
    encoding, folder = KINDS[request.param](), tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(encoding, folder, 1 << 20)
    return encoding, folder, transformers.AutoTokenizer.from_pretrained(folder), to_tokenizers(encoding)


def test_tokenizers_give_the_same_ids_on_ten_thousand_texts(leaving):
    encoding, _, theirs, plain = leaving
    seen = set()

    @given(st.lists(TEXTS, min_size=40, max_size=60, unique=True))
    @settings(max_examples=110, deadline=None)
    def check(texts):
        ids = theirs(texts).input_ids
        for text, found in zip(texts, ids):
            assert found == encoding.encode_ordinary(text), text  # end-of-text written in a text is text
            if "<|" in text:
                assert plain.encode(text).ids == encoding.encode(text, allowed_special="all"), text
            seen.add(text)
        assert [theirs.decode(found) for found in ids] == texts

    check()
    for start in range(0, 40000, 100):  # and code, line by line and across lines
        check.hypothesis.inner_test([document[start : start + 97] for document in DOCUMENTS if start < len(document)])
    assert len(seen) > 10_000


def test_tokenizers_come_back(leaving):
    encoding, folder, _, _ = leaving
    again = read_tokenizer(folder)
    assert (again._mergeable_ranks, again._special_tokens) == (encoding._mergeable_ranks, encoding._special_tokens)
    for text in [*DOCUMENTS[:10], *PIECES, " \n \n"]:
        assert again.encode_ordinary(text) == encoding.encode_ordinary(text)
    assert get_tokenizer(str(folder), encoding.n_vocab).n_vocab == encoding.n_vocab


def test_any_vocabulary_leaves_with_the_same_ids():
    """Also one that no training gives, in which the same token comes from several pairs."""
    chance = random.Random(0)
    for _ in range(100):
        tokens = list({bytes(chance.choices(b"ab ", k=chance.randint(2, 6))) for _ in range(chance.randint(3, 40))})
        ranks = {bytes([byte]): byte for byte in range(256)} | {token: 256 + i for i, token in enumerate(tokens)}
        special = {"<|endoftext|>": len(ranks)}
        encoding = tiktoken.Encoding("any", pat_str=BYTES._pat_str, mergeable_ranks=ranks, special_tokens=special)
        theirs = to_tokenizers(encoding)
        for _ in range(20):
            text = "".join(chance.choices("ab ", k=chance.randint(1, 40)))
            assert theirs.encode(text).ids == encoding.encode_ordinary(text)


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_patterns_of_larger_vocabularies_cut_the_same(name, monkeypatch):
    """Their vocabularies need a download; their patterns, with special ids after a gap, are tried on another."""
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    pattern = openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]
    ranks = KINDS["bpe"]()._mergeable_ranks
    special = {"<|endoftext|>": len(ranks) + 5, "<|fim|>": len(ranks) + 9}
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    theirs = to_tokenizers(encoding)

    @given(st.lists(TEXTS, min_size=20, max_size=20))
    @settings(max_examples=60, deadline=None)
    def check(texts):
        for text in texts:
            assert theirs.encode(text).ids == encoding.encode(text, allowed_special="all"), text

    check()


def test_a_tokenizer_is_the_same_in_a_folder_of_another_name(tmp_path):
    for name in ("mine", "moved"):
        (tmp_path / name).mkdir()
        save_tokenizer(BYTES, tmp_path / name, 100)
    ours, moved = (tokenizer_to_dict(read_tokenizer(tmp_path / name)) for name in ("mine", "moved"))
    assert ours == moved  # a run begun with one goes on with the other


def test_a_tokenizer_that_cuts_or_fills_up_gives_the_ids_of_the_whole_text(tmp_path):
    """Files saved after use may say so: that is of batches, and not of the ids of a text."""
    save_tokenizer(BYTES, tmp_path, 100)
    path = tmp_path / "tokenizer.json"
    theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.enable_truncation(3)
    theirs.enable_padding(length=512)
    theirs.save(str(path))
    assert read_tokenizer(tmp_path).encode_ordinary("Größe") == BYTES.encode_ordinary("Größe")


ALPHABET = tokenizers.pre_tokenizers.ByteLevel.alphabet()


@pytest.mark.parametrize(
    ("first", "last", "alphabet", "named"),
    [
        ([], ["<|endoftext|>"], ALPHABET, None),
        ([], ["</s>"], ALPHABET, "added_tokens are without <|endoftext|>"),
        (["<|endoftext|>"], [], ALPHABET, "ids begin after a special token; train without one, and add it afterwards"),
        ([], [], ALPHABET, "added_tokens are without <|endoftext|>"),
        ([], ["<|endoftext|>"], [], "vocab lacks 244 bytes of 256; give the trainer initial_alphabet="),
    ],
)
def test_a_tokenizer_that_was_just_learned(tmp_path, first, last, alphabet, named):
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=first, initial_alphabet=alphabet)
    theirs.train_from_iterator(["the lower, the slower; the lowest, the slowest\n"] * 50, trainer)
    theirs.add_special_tokens(last)
    theirs.save(str(tmp_path / "tokenizer.json"))
    if named:
        with pytest.raises(DataError, match=named):
            read_tokenizer(tmp_path)
    else:
        ours = read_tokenizer(tmp_path)
        assert ours.encode_ordinary("the slower") == theirs.encode("the slower").ids
        assert ours.eot_token == theirs.token_to_id("<|endoftext|>")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer changes the text"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer is .*Metaspace"),
        ({"model": {"type": "WordPiece"}}, "model is WordPiece"),
        ({"model": {"type": "BPE", "vocab": {"a": 5}, "merges": []}}, "ids have gaps"),
        ({"model": {"type": "BPE", "vocab": {"a" * 1001: 0}, "merges": []}}, "a token of 1,001 bytes"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "adds a space"),
        ({"model": 3}, "not a byte-level BPE"),
        ({"added_tokens": {"a": 1}}, "not a byte-level BPE"),
        ({"added_tokens": [{"content": "<|endoftext|>", "id": 1 << 40}]}, "not a byte-level BPE"),
        ({"pre_tokenizer": None}, "not a byte-level BPE"),
        ({"truncation": "x"}, "not a byte-level BPE"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_other_tokenizers_are_refused_by_name(tmp_path, change, named):
    save_tokenizer(BYTES, tmp_path, 100)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=named):
        read_tokenizer(tmp_path)
