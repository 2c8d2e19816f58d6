"""Models leave and enter as Hugging Face checkpoints, which `transformers` and all that builds on it read as they are.

Weights are renamed and never reordered. GPT-2 stores its matrices transposed, and queries, keys and values in one
tensor: that is a matter of its files, the numbers keep their order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import tiktoken
import torch
from safetensors import safe_open
from torch import Tensor

from machinery.checkpoints import WEIGHTS, copy_weights, read_newest, read_state, read_weights
from machinery.errors import printable, told
from machinery.files import IS_IT_A_RUN, folder_path, publish, read_json, read_note, remove, sha256, write_json
from machinery.huggingface.families import (
    PARTS,
    ExportError,
    Family,
    family_of,
    kv_heads_of,
    model_fields,
    positions_of,
    to_hf_config,
)
from machinery.huggingface.tokenizers import read_tokenizer, save_tokenizer
from machinery.notebook import definitions_in_use
from machinery.saved_run import tokenizer_of_run
from machinery.tokenizers import END_OF_TEXT


def _empty_model(hf_config, tensors: int):
    """Their model, with shapes and without memory. Raises `ExportError` for more layers than there are `tensors`."""
    import transformers

    if hf_config.num_hidden_layers > tensors:  # building thousands takes a while
        raise ExportError(f"config.json has {hf_config.num_hidden_layers} layers and the weights {tensors} tensors")
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)


def _renamed(family: Family, biased: bool, names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Each of their tensors with ours that it holds, one below the other; none for a bias that this stack lacks.

    Queries and keys have biases if `biased`.
    """
    for name in names:
        module, leaf = name.rsplit(".", 1)
        layer = re.fullmatch(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)", module)
        prefix, module = (f"blocks.{layer[1]}.", layer[2]) if layer else ("", module)
        theirs = max((known for known in family.modules if f"{module}.".startswith(f"{known}.")), key=len)
        ours = [part + module[len(theirs) :] for part in family.modules[theirs].split()]
        if ours == ["position"]:
            yield name, ["position.table"]
        elif leaf == "bias" and not (
            (family.norm == "layer" and ours[0].endswith("norm")) or (biased and ours[0].endswith(("q_proj", "k_proj")))
        ):
            yield name, []
        else:
            yield name, [f"{prefix}{part}.{leaf}" for part in ours]


def _is_transposed(family: Family, name: str) -> bool:
    """Whether theirs is a Conv1D, which stores (in, out) where a Linear stores (out, in)."""
    return family.model_type == "gpt2" and re.search(r"\.c_\w+\.weight$", name) is not None


# ------------------------------------------------------------------------------------------------------ out


def _to_hf_model(config: dict, state: dict[str, Tensor]):
    """A `transformers` model to save, which shares our weights' memory. Raises `ExportError` where they do not fit."""
    family = family_of(config)
    state = {"head.weight": state["embedding.weight"], **state} if config["tie_embeddings"] else state
    if config.get("embedding_norm"):  # of each row, so it can be done once; the head keeps the rows as they are
        table = state["embedding.weight"].float()
        unit = table * torch.rsqrt(table.square().mean(-1, keepdim=True) + config["norm_eps"])
        state, config = {**state, "embedding.weight": unit}, config | {"tie_embeddings": False}
    model = _empty_model(to_hf_config(config), len(state))
    biased, renamed, used = "blocks.0.attention.q_proj.bias" in state, {}, set()
    try:
        for name, ours in _renamed(family, biased, model.state_dict()):
            parts = [state[part] for part in ours]
            shape = model.get_parameter(name).shape
            whole = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else torch.zeros(shape)
            renamed[name] = whole.T.contiguous() if _is_transposed(family, name) else whole
            used |= set(ours)
        if left := sorted(set(state) - used):
            raise ExportError(f"{left[0]} has no place in {family.model_type}")
        model.load_state_dict(renamed, assign=True)
        model.tie_weights()
    except (KeyError, RuntimeError) as error:
        raise ExportError(
            "weights and config.json do not belong together, or are of a class of your own, which no family has:"
            f" {str(error).strip().splitlines()[-1].strip()[:160]}"
        ) from None
    return model


def export_hf(run_dir: str | Path, out_dir: str | Path, step: int | None = None) -> Path:
    """Write a run's newest checkpoint, or that of `step`, to `out_dir` as a Hugging Face checkpoint: float32, with
    tokenizer and card.

    An earlier export there is replaced when the new one is complete. Raises `ExportError` for a configuration without
    an equivalent, and for a folder that holds anything that this function did not write.
    """
    import transformers  # noqa: F401 - where it is missing, that is the error

    run, out_dir = folder_path(run_dir), folder_path(out_dir, "a folder to write to")
    config = _Fields(read_json(run / "config.json", advice=IS_IT_A_RUN))
    encoding = tokenizer_of_run(run, config)
    with told(run / "config.json", ExportError):
        family_of(config)
    with told(run, ExportError):
        weights, state = read_newest(
            run, lambda checkpoint: (read_weights(checkpoint), read_state(checkpoint, WEIGHTS)), step
        )
    with told(out_dir, ExportError, "not usable"):
        out = out_dir.resolve()  # through a link: its user means the folder there
        _check_target(out)
    with told(run / "config.json", ExportError):
        model = _to_hf_model(config, weights)
        _set_generation(model, encoding.eot_token, config["sample_tokens"])
        card = _model_card(run, config, state)
    with told(out_dir, ExportError, "not written"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".part") as name:
            beside = Path(name) / out.name
            beside.mkdir()
            model.save_pretrained(beside)
            save_tokenizer(encoding, beside, positions_of(config))
            _check_logits(run, state["step"], beside)
            (beside / "README.md").write_text(card, encoding="utf-8")
            write_json(beside / MARK, {"files": _checksums(beside)})
            _check_target(out)  # again: exporting takes a while
            if earlier := publish(beside, out):
                remove(earlier)
    return out_dir


@torch.no_grad()
def _check_logits(run: Path, step: int, exported: Path) -> None:
    """Raise `ExportError` unless transformers computes what this stack does, as it is defined here."""
    from transformers import AutoModelForCausalLM

    ours = definitions_in_use().load_run(run, step=step)[1]  # tells of classes that the run was not trained with
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokens = torch.arange(min(16, ours.max_length))[None] % theirs.config.vocab_size
    expected = ours(tokens)
    difference = (expected - theirs(tokens).logits).abs().max().item()
    if difference > 1e-3 * max(1, expected.abs().max().item()):
        raise ExportError(
            f"logits of {theirs.config.model_type} differ from this stack's by up to {difference:.2g}: a block, or"
            " another class, computes otherwise"
        )


def _set_generation(model, end_of_text: int, max_new_tokens: int) -> None:
    model.config.bos_token_id = model.config.eos_token_id = end_of_text
    generation = model.generation_config
    generation.bos_token_id = generation.eos_token_id = generation.pad_token_id = end_of_text
    generation.update(do_sample=True, temperature=0.8, top_p=0.95, max_new_tokens=max_new_tokens)
    generation.validate()


MARK = "lmharness.json"  # in each export: its files and their checksums


def _checksums(folder: Path) -> dict[str, str]:
    found = sorted(path for path in folder.iterdir() if path.name != MARK)
    return {path.name: sha256(path) if path.is_file() else "not a file" for path in found}


def _check_target(out: Path) -> None:
    """Raise `ExportError` unless `out` is absent, empty, or an export with nothing added or changed."""
    if Path.cwd().is_relative_to(out):
        raise ExportError(f"{out} is the folder you are in, or around it; name another, such as export")
    if not out.exists():
        return
    if not out.is_dir():
        raise ExportError(f"{out} is a file; name a folder")
    with told(out, ExportError, "not readable"):
        if not any(out.iterdir()):
            return
        written = read_note(out / MARK).get("files")
        written = written if isinstance(written, dict) else {}
        others = sorted(name for name, found in _checksums(out).items() if written.get(name) != found)
    if others or not written:
        what = f"{', '.join(others[:3])} differs" if written else f"no {MARK} of one"
        raise ExportError(f"{out} holds other things than an export as it was written ({what}); choose another folder")


class _Fields(dict):
    """The fields of a run's config.json. One that is missing is named."""

    def __missing__(self, name: str) -> object:
        raise ExportError(f"{name} is missing")


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [lmharness]
---

# {name}

A base model that continues text, trained with LMHarness.

| | |
| --- | --- |
{table}

In training every document began after `{end}`: put its id before a prompt. Written in a text, it is text.
"""


def _model_card(run: Path, config: dict, state: dict) -> str:
    """README.md: data, recipe, tokens, losses, and what produced it, all from the run's files."""
    family = family_of(config)
    environment, summary = read_note(run / "environment.json"), read_note(run / "summary.json")
    versions = environment.get("versions")

    def listed(*names: str) -> str:
        return ", ".join(f"{name} {config[name]}" for name in names)

    rows = {
        "architecture": f"{family.model_type}, {kv_heads_of(config)} key/value heads, "
        + listed("n_layer", "n_embd", "n_head", "n_ffn", "vocab_size", *PARTS, "rope_base", "tie_embeddings"),
        "context": f"{config['block_size']} tokens in training; it can count to {positions_of(config)}",
        "data": config["source"],
        "held-out text": config["val_source"] or f"{config['val_fraction']:.2%}: whole documents, or the ends of them",
        "tokenizer": config["tokenizer"],
        "begun from": config.get("init_from") or "random weights",
        "recipe": listed("optimizer", "lr", "embedding_lr", "head_lr", "weight_decay", "grad_clip", "schedule")
        + ", " + listed("warmup", "decay", "batch_tokens", "seed"),
        "tokens": f"{state.get('tokens', 0):,} in {state['step']:,} steps and {state.get('seconds', 0):,.0f} s",
        "losses": ", ".join(f"{name} {round(value, 4):,}" for name, value in state.get("scores", {}).items()) or "none",
        "status": summary.get("status", "had not ended when this was written"),
        "GGUF": f"does llama.cpp compute the same? {family.gguf}",
        "device": f"{environment.get('device')}, {environment.get('dtype')}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items())
        if isinstance(versions, dict) else "unknown",
        "LMHarness": f"commit {environment.get('commit') or 'unknown'}",
    }  # fmt: skip
    texts = {name: printable(str(text)).replace("|", "\\|") for name, text in rows.items()}
    table = "\n".join(f"| {name} | {text} |" for name, text in texts.items())
    return CARD.format(name=run.name, table=table, end=END_OF_TEXT)


# ------------------------------------------------------------------------------------------------------- in


def config_from_hf(checkpoint: str | Path) -> dict:
    """The overrides that make a Config the model of a Hugging Face checkpoint, a folder or a hub name.

    With `init_from` and its tokenizer, ready to train on. Raises `ExportError`, naming it, for a feature that this
    stack does not have.
    """
    folder = checkpoint_folder(checkpoint)
    values = model_fields(folder) | {"init_from": str(checkpoint)}
    return values | ({"tokenizer": str(folder)} if (folder / "tokenizer.json").exists() else {})


def checkpoint_folder(checkpoint: str | Path) -> Path:
    """A local folder as it is; of a hub name the local copy, fetched if need be. Nothing executable is fetched."""
    folder = folder_path(checkpoint, "the folder of a Hugging Face checkpoint, or its hub name")
    if os.path.isdir(folder):
        return folder
    from huggingface_hub import snapshot_download

    with told(f"init_from {str(checkpoint)!r}", ExportError, "neither a folder here nor to be had from the hub"):
        return Path(snapshot_download(str(checkpoint), allow_patterns=["*.json", "*.safetensors"]))


def import_hf(checkpoint: str | Path, config: dict | None = None) -> tuple[dict, dict[str, Tensor]]:
    """The model fields of a Config that a Hugging Face checkpoint is, and its weights under our names, in float32.

    With `config`, its fields have to be the same. Raises `ExportError`, naming both values or what is in the way,
    before any weight is read.
    """
    folder = checkpoint_folder(checkpoint)
    values = model_fields(folder)
    if config is not None:
        _check_same(folder, values, config)
    files, found = _tensor_files(folder)
    with told(folder, ExportError):
        family, model = family_of(values), _empty_model(to_hf_config(values), len(found))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if values["tie_embeddings"] and "lm_head.weight" not in found:
        expected.pop("lm_head.weight")
    extra = [name for name in found if name not in expected]
    for name in [*sorted(set(expected) - set(found)), *extra]:
        if not (name.endswith("bias") and name in expected):  # a bias that is not there adds nothing
            raise ExportError(
                f"{folder}: {name} is {found.get(name, 'missing')} there, {expected.get(name, 'not')} here"
            )
    for name in found:
        if found[name] != expected[name]:
            raise ExportError(f"{folder}: {name} is {found[name]} there and {expected[name]} by its config.json")
    sizes = {"q_proj": values["n_embd"]}
    sizes |= dict.fromkeys(("k_proj", "v_proj"), values["n_embd"] // values["n_head"] * values["n_kv_head"])
    missing = _renamed(family, values["induction"], set(expected) - set(found))  # biases
    state = {part: torch.zeros(expected[name]) for name, ours in missing for part in ours}
    for name, ours in _renamed(family, values["induction"], found):
        with told(files[name], ExportError, f"{name} not readable"), safe_open(files[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        if not tensor.is_floating_point():
            raise ExportError(f"{folder}: {name} holds {str(tensor.dtype)[6:]}; weights come in as floating point")
        tensor = tensor.float()
        if not tensor.isfinite().all():
            raise ExportError(f"{folder}: {name} holds values that are not finite in float32; use an undamaged copy")
        if not ours and tensor.any():
            raise ExportError(f"{folder}: {name} is a bias that is not zero, and this stack has none there")
        if _is_transposed(family, name):
            tensor = tensor.T
        rows = [sizes[part.split(".")[-2]] for part in ours] if len(ours) > 1 else len(tensor)
        state |= {part: piece.contiguous() for part, piece in zip(ours, tensor.split(rows))}
    head = state.setdefault("head.weight", state["embedding.weight"])
    if values["tie_embeddings"] and not torch.equal(head, state["embedding.weight"]):
        raise ExportError(
            f"{folder}: lm_head.weight differs from the embedding and tie_word_embeddings is true in config.json;"
            " set it to false there, as transformers takes it"
        )
    return values, state


def _check_same(folder: Path, values: dict, config: dict) -> None:
    """Raise `ExportError` unless `config` is the model that the checkpoint's `values` are."""
    wanted = config | {"n_kv_head": kv_heads_of(config)}
    wanted["attention"] = "mha" if wanted["n_kv_head"] == wanted["n_head"] else config["attention"]
    wanted["block_size"] = positions_of(config)
    # With "rope", angles are computed for as many positions as are wanted
    unused = {
        "none": {"rope_base", "block_size", "induction"},
        "absolute": {"rope_base", "induction"},
        "rope": {"block_size"},
    }
    for name, value in values.items():
        is_slower = name == "rope_base" and wanted[name] > value  # turns, for a longer context
        if wanted[name] != value and not is_slower and name not in unused[values["position"]]:
            label = "n_position (or block_size)" if name == "block_size" else name
            raise ExportError(
                f"{label} is {wanted[name]!r} but {value!r} in init_from {folder.name!r};"
                " config_from_hf(…) of machinery.huggingface gives overrides that fit"
            )


def _tensor_files(folder: Path) -> tuple[dict[str, Path], dict[str, tuple]]:
    """Which file of a checkpoint holds each tensor, and its shape, from the headers of the files."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        with told(index, ExportError, "does not say which file holds each tensor"):
            names = set(read_json(index)["weight_map"].values())
            if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise ValueError("its weight_map is empty or holds other things than names of files beside it")
    files, shapes = {}, {}
    for name in sorted(names):
        path = folder / name
        with told(path, ExportError, "not readable"):
            if not path.is_file():
                raise ExportError(f"{path} is missing; weights come in as safetensors only")
            with safe_open(path, framework="pt") as file:
                for tensor in file.keys():  # noqa: SIM118
                    files[tensor], shapes[tensor] = path, tuple(file.get_slice(tensor).get_shape())
    return files, shapes


def begin_with(checkpoint: str | Path, model: torch.nn.Module, config: dict, encoding: tiktoken.Encoding) -> None:
    """Copy the weights of a Hugging Face checkpoint into `model`. Raises `ExportError` where anything does not fit,
    also an `encoding` that gives other ids than it was trained on, where it says which those are.
    """
    folder = checkpoint_folder(checkpoint)
    weights = import_hf(folder, config)[1]
    if (folder / "tokenizer.json").exists():
        theirs = read_tokenizer(folder)
        if (theirs._mergeable_ranks, theirs.eot_token) != (encoding._mergeable_ranks, encoding.eot_token):
            raise ExportError(
                f"tokenizer {encoding.name!r} ({encoding.n_vocab} tokens) is not that of init_from {str(checkpoint)!r}"
                f" ({theirs.n_vocab} tokens); set tokenizer to that folder"
            )
    elif config["tokenizer"] == "bpe":
        raise ExportError(
            f"init_from {str(checkpoint)!r} has no tokenizer.json, and ids of a 'bpe' that is learned from the source"
            " stand for other text: set tokenizer to that of the checkpoint, as tokenizer.json or one of tiktoken"
        )
    if other := sorted(weights.keys() ^ model.state_dict().keys()):  # of a class of one's own
        where = f"init_from {str(checkpoint)!r}" if other[0] in weights else "the model"
        raise ExportError(f"{other[0]} is only in {where}; for classes with other weights: docs/huggingface.md")
    copy_weights(weights, model)
