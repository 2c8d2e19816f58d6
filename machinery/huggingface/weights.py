"""Models leave and enter as Hugging Face checkpoints, which `transformers` and all that builds on it read as they are.

Weights are renamed and never reordered. GPT-2 stores its matrices transposed, and queries, keys and values in one
tensor: that is a matter of its files, the numbers keep their order.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from machinery.checkpoints import newest_checkpoint, read_state
from machinery.files import read_json
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
from machinery.tokenizers import END_OF_TEXT, tokenizer_from_dict

__all__ = ["ExportError", "check_tokenizer", "config_from_hf", "export_hf", "import_hf"]


def _empty_model(hf_config):
    """Their model, with shapes and without memory."""
    import transformers

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)


def _renamed(family: Family, names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Each of their tensors with ours that it holds, one below the other; none for a bias that this stack lacks."""
    for name in names:
        module, leaf = name.rsplit(".", 1)
        layer = re.fullmatch(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)", module)
        prefix, module = (f"blocks.{layer[1]}.", layer[2]) if layer else ("", module)
        for theirs in sorted(family.modules, key=len, reverse=True):
            if module == theirs or module.startswith(theirs + "."):
                ours = [part + module[len(theirs) :] for part in family.modules[theirs].split()]
                break
        if ours == ["position"]:
            yield name, ["position.table"]
        elif leaf == "bias" and not (family.norm == "layer" and ours[0].endswith("norm")):
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
    model = _empty_model(to_hf_config(config))
    state = {"head.weight": state["embedding.weight"], **state} if config["tie_embeddings"] else state
    renamed, used = {}, set()
    try:
        for name, ours in _renamed(family, model.state_dict()):
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
            f"weights and config.json do not belong together: {str(error).strip().splitlines()[-1].strip()[:160]}"
        ) from None
    return model


def export_hf(run_dir: str | Path, out_dir: str | Path) -> Path:
    """Write a run's newest checkpoint to `out_dir` as a Hugging Face checkpoint: float32, with tokenizer and card.

    An earlier export there is replaced when the new one is complete. Raises `ExportError` for a configuration without
    an equivalent and for a folder that holds anything else.
    """
    run, out = Path(run_dir), Path(out_dir)
    config = read_json(run / "config.json")
    family = family_of(config)
    encoding = tokenizer_from_dict(read_json(run / "tokenizer.json"))
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        raise ExportError(f"{run} has no checkpoint yet")
    if out.exists() and not (out.is_dir() and _is_export(out)):
        raise ExportError(f"{out} holds other things than an export; choose another folder")
    beside = out.with_name(f".{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        model = _to_hf_model(config, load_file(checkpoint / "model.safetensors"))
        end = encoding.eot_token
        model.config.bos_token_id = model.config.eos_token_id = end
        generation = model.generation_config
        generation.bos_token_id = generation.eos_token_id = generation.pad_token_id = end
        generation.update(do_sample=True, temperature=0.8, top_p=0.95, max_new_tokens=config["sample_tokens"])
        model.save_pretrained(beside)
        save_tokenizer(encoding, beside, positions_of(config))
        card = _model_card(run, config, family, read_state(checkpoint))
        (beside / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return out


def _is_export(folder: Path) -> bool:
    known = (
        r"(config|generation_config|tokenizer|tokenizer_config)\.json|README\.md|model.*\.safetensors(\.index\.json)?"
    )
    return all(path.is_file() and re.fullmatch(known, path.name) for path in folder.iterdir())


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


def _model_card(run: Path, config: dict, family: Family, state: dict) -> str:
    """README.md: data, recipe, tokens, losses, and what produced it, all from the run's files."""
    environment = read_json(run / "environment.json")
    summary = read_json(run / "summary.json") if (run / "summary.json").exists() else {}

    def listed(*names: str) -> str:
        return ", ".join(f"{name} {config[name]}" for name in names)

    rows = {
        "architecture": f"{family.model_type}, {kv_heads_of(config)} key/value heads, "
        + listed("n_layer", "n_embd", "n_head", "n_ffn", "vocab_size", *PARTS, "rope_base", "tie_embeddings"),
        "context": f"{config['block_size']} tokens in training; it can count to {positions_of(config)}",
        "data": config["source"],
        "held-out text": config["val_source"] or f"{config['val_fraction']:.2%} of the documents, by a hash",
        "tokenizer": config["tokenizer"],
        "begun from": config.get("init_from") or "random weights",
        "recipe": listed("optimizer", "lr", "embedding_lr", "weight_decay", "grad_clip", "schedule", "warmup", "decay")
        + ", " + listed("batch_tokens", "seed"),
        "tokens": f"{state.get('tokens', 0):,} in {state['step']:,} steps and {state.get('seconds', 0):,.0f} s",
        "losses": ", ".join(f"{name} {value:.4f}" for name, value in state.get("scores", {}).items()) or "none",
        "status": summary.get("status", "had not ended when this was written"),
        "GGUF": f"does llama.cpp compute the same? {family.gguf}",
        "device": f"{environment.get('device')}, {environment.get('dtype')}",
        "versions": ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items()),
        "LMHarness": f"commit {environment.get('commit') or 'unknown'}",
    }  # fmt: skip
    table = "\n".join("| {} | {} |".format(name, str(text).replace("|", "\\|")) for name, text in rows.items())
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
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(checkpoint), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # whatever the network libraries raise
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise ExportError(
            f"init_from {str(checkpoint)!r} is neither a folder here nor to be had from the hub ({line})"
        ) from None


def import_hf(checkpoint: str | Path, config: dict | None = None) -> tuple[dict, dict[str, Tensor]]:
    """The model fields of a Config that a Hugging Face checkpoint is, and its weights under our names, in float32.

    With `config`, its fields have to be the same. Raises `ExportError`, naming both values or what is in the way,
    before any weight is read.
    """
    folder = checkpoint_folder(checkpoint)
    values = model_fields(folder)
    if config is not None:
        _check_same(folder, values, config)
    family, model = family_of(values), _empty_model(to_hf_config(values))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    files, found = _tensor_files(folder)
    if values["tie_embeddings"]:
        expected.pop("lm_head.weight")
        found.pop("lm_head.weight", None)
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
    state = {}
    for name, ours in _renamed(family, found):
        with safe_open(files[name], framework="pt") as file:
            tensor = file.get_tensor(name).float()
        if not ours and tensor.any():
            raise ExportError(f"{folder}: {name} is a bias that is not zero, and this stack has none there")
        if _is_transposed(family, name):
            tensor = tensor.T
        rows = [sizes[part.split(".")[-2]] for part in ours] if len(ours) > 1 else len(tensor)
        state |= {part: piece.contiguous() for part, piece in zip(ours, tensor.split(rows))}
    return values, state | ({"head.weight": state["embedding.weight"]} if values["tie_embeddings"] else {})


def _check_same(folder: Path, values: dict, config: dict) -> None:
    """Raise `ExportError` unless `config` is the model that the checkpoint's `values` are."""
    wanted = config | {"n_kv_head": kv_heads_of(config)}
    wanted["attention"] = "mha" if wanted["n_kv_head"] == wanted["n_head"] else config["attention"]
    wanted["block_size"] = positions_of(config)
    for name, value in values.items():
        unused = (name == "rope_base" or name == "block_size") and values["position"] == "none"
        shorter = name == "block_size" and values["position"] == "rope"  # angles are computed for as many as are wanted
        if wanted[name] != value and not (unused or shorter):
            label = "n_position (or block_size)" if name == "block_size" else name
            raise ExportError(
                f"{label} is {wanted[name]!r} but {value!r} in init_from {folder.name!r};"
                " config_from_hf(…) of export_utils gives overrides that fit"
            )


def check_tokenizer(checkpoint: str | Path, encoding: tiktoken.Encoding) -> None:
    """Raise `ExportError` unless `encoding` gives the ids that the checkpoint was trained on, where it says which."""
    folder = checkpoint_folder(checkpoint)
    if (folder / "tokenizer.json").exists():
        theirs = read_tokenizer(folder)
        if (theirs._mergeable_ranks, theirs.eot_token) != (encoding._mergeable_ranks, encoding.eot_token):
            raise ExportError(
                f"tokenizer {encoding.name!r} ({encoding.n_vocab} tokens) is not that of init_from {str(checkpoint)!r}"
                f" ({theirs.n_vocab} tokens); set tokenizer to that folder"
            )


def _tensor_files(folder: Path) -> tuple[dict[str, Path], dict[str, tuple]]:
    """Which file of a checkpoint holds each tensor, and its shape, from the headers of the files."""
    index = folder / "model.safetensors.index.json"
    names = set(read_json(index)["weight_map"].values()) if index.exists() else {"model.safetensors"}
    files, shapes = {}, {}
    for name in sorted(names):
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise ExportError(f"{path} is missing; weights come in as safetensors only")
        try:
            with safe_open(path, framework="pt") as file:
                for tensor in file.keys():  # noqa: SIM118
                    files[tensor], shapes[tensor] = path, tuple(file.get_slice(tensor).get_shape())
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{path}: not readable ({str(error).splitlines()[0][:120]})") from None
    return files, shapes
