"""Which architecture of `transformers` computes exactly what a configuration does: a table, read in both directions."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from machinery.errors import UserError, told
from machinery.files import read_json
from machinery.settings import LIMITS, kv_heads


class ExportError(UserError):
    """A model that has no exact equivalent on the other side."""


LLAMA_MODULES = {
    "model.embed_tokens": "embedding", "input_layernorm": "attention_norm", "self_attn": "attention",
    "post_attention_layernorm": "ffn_norm", "mlp": "ffn", "model.norm": "norm", "lm_head": "head",
}  # fmt: skip
APERTUS_MODULES = LLAMA_MODULES | {"attention_layernorm": "attention_norm", "feedforward_layernorm": "ffn_norm"}
STARCODER2_MODULES = LLAMA_MODULES | {"mlp.c_fc": "ffn.up_proj", "mlp.c_proj": "ffn.down_proj"}
GPT2_MODULES = {
    "transformer.wte": "embedding", "transformer.wpe": "position", "ln_1": "attention_norm",
    "attn.c_attn": "attention.q_proj attention.k_proj attention.v_proj", "attn.c_proj": "attention.o_proj",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn.up_proj", "mlp.c_proj": "ffn.down_proj",
    "transformer.ln_f": "norm", "lm_head": "head",
}  # fmt: skip
LLAMA_FIELDS = {
    "n_layer": "num_hidden_layers", "n_embd": "hidden_size", "n_ffn": "intermediate_size",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
    "block_size": "max_position_embeddings", "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip
GPT2_FIELDS = {
    "n_layer": "n_layer", "n_embd": "n_embd", "n_head": "n_head", "n_ffn": "n_inner", "block_size": "n_positions",
    "vocab_size": "vocab_size", "norm_eps": "layer_norm_epsilon", "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip
GELU = {"hidden_act": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class Family:
    """An architecture of `transformers`, and the choices of this stack that compute the same."""

    model_type: str
    position: str
    ffn: str
    norm: str
    qk_norm: bool = False
    attention: str = "any"  # "any" number of key/value heads, "mha": one for each query head, "mqa": one
    biases: str = "attention_bias"  # its setting that gives queries and keys biases, as `induction` does with "rope"
    gguf: str = "yes"  # whether llama.cpp computes the same; it fixes some settings that `transformers` reads
    settings: dict = field(default_factory=dict)  # of its config, besides sizes
    fields: dict = field(default_factory=lambda: LLAMA_FIELDS)  # our config fields under its names
    modules: dict = field(default_factory=lambda: LLAMA_MODULES)  # its modules under our names


FAMILIES = [
    Family("llama", "rope", "gated", "rms"),
    Family("qwen3", "rope", "gated", "rms", qk_norm=True),
    Family("arcee", "rope", "relu2", "rms", settings={"hidden_act": "relu2"}),
    Family("arcee", "rope", "mlp", "rms", gguf="no, has ReLU²", settings=GELU),
    Family(
        "apertus", "rope", "mlp", "rms", qk_norm=True, gguf="no, has xIELU",
        settings=GELU, modules=APERTUS_MODULES,
    ),
    Family(
        "stablelm", "rope", "gated", "layer", biases="use_qkv_bias",
        fields=LLAMA_FIELDS | {"norm_eps": "layer_norm_eps"}, settings={"partial_rotary_factor": 1.0},
    ),
    Family(
        "starcoder2", "rope", "mlp", "layer", biases="use_bias", modules=STARCODER2_MODULES,
        fields=LLAMA_FIELDS | {"norm_eps": "norm_epsilon"}, settings=GELU,
    ),
    Family("smollm3", "none", "gated", "rms", gguf="no, has RoPE in three of four layers"),
    Family(
        "gpt2", "absolute", "mlp", "layer", attention="mha", gguf="if n_ffn is 4 n_embd",
        fields=GPT2_FIELDS, modules=GPT2_MODULES,
    ),
    Family(
        "gpt_bigcode", "absolute", "mlp", "layer", attention="mqa", gguf="if n_ffn is 4 n_embd",
        settings={"multi_query": True}, fields=GPT2_FIELDS, modules=GPT2_MODULES,
    ),
]  # fmt: skip
PARTS = ("position", "ffn", "norm", "qk_norm")
SIZES = ("n_layer", "n_embd", "n_head", "n_kv_head", "n_ffn", "vocab_size", "block_size")
SAME = {"gelu_new": "gelu_pytorch_tanh"}  # two names of one function
# What a config says about training, output or bookkeeping. Everything else changes what a model computes.
HARMLESS = {
    "attention_dropout", "hidden_dropout", "residual_dropout", "embedding_dropout", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp",
    "max_window_layers", "no_rope_layer_interval", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32",
    "reorder_and_upcast_attn", "n_ctx", "partial_rotary_factor",  # the library moves this one to rope_parameters
}  # fmt: skip


def family_of(config: dict) -> Family:
    """The row of `FAMILIES` that is `config`.

    Raises `ExportError` naming a choice that no row has, or what the nearest rows have instead.
    """
    kv_heads = kv_heads_of(config)
    choices = {part: list(dict.fromkeys(getattr(family, part) for family in FAMILIES)) for part in PARTS}
    for part, known in (choices | {"attention": ["mha", "gqa"]}).items():
        if config[part] not in known:
            raise ExportError(
                f"{part} {config[part]!r} has no equivalent in transformers; {' or '.join(map(repr, known))} has"
            )
    counts = {"any": kv_heads, "mha": config["n_head"], "mqa": 1}  # of key/value heads
    changes = []  # for each row, what it has instead
    for family in FAMILIES:
        instead = {part: repr(getattr(family, part)) for part in PARTS if getattr(family, part) != config[part]}
        if kv_heads != counts[family.attention]:
            instead["attention"] = f"of {counts[family.attention]} key/value heads"
        if not instead:
            return family
        changes.append(instead)
    nearest = [instead for instead in changes if len(instead) == min(map(len, changes))]
    parts = [part for instead in nearest for part in instead]
    named = max([*PARTS, "attention"], key=lambda part: (parts.count(part), part in nearest[-1]))
    heads = f" with {kv_heads} key/value heads for {config['n_head']} query heads" if named == "attention" else ""
    others = ", ".join(f"{part} {config[part]!r}" for part in PARTS if part != named)
    ways = dict.fromkeys(" and ".join(f"{part} {value}" for part, value in way.items()) for way in nearest)
    raise ExportError(
        f"{named} {config[named]!r}{heads} has no equivalent in transformers with {others};"
        f" there is one with {', or with '.join(ways)}"
    )


def positions_of(config: dict) -> int:
    """The longest sequence the model can take."""
    return config.get("n_position") or config["block_size"]


def kv_heads_of(config: dict) -> int:
    """K, key/value heads of a config as a dictionary."""
    return kv_heads(SimpleNamespace(**{name: config[name] for name in ("attention", "n_head", "n_kv_head")}))


def _check_size(ours: str, value: object, name: str) -> None:
    if type(value) is not int or not 0 < value <= LIMITS[ours]:
        raise ExportError(f"{name} is {value!r}; it must be a whole number from 1 to {LIMITS[ours]:,}")


def to_hf_config(config: dict):
    """The `transformers` config of a Config's fields. Raises `ExportError` where there is none."""
    import transformers

    values = config | {"block_size": positions_of(config), "n_kv_head": kv_heads_of(config)}
    for ours in SIZES:
        _check_size(ours, values[ours], ours)
    heads, kv_heads = values["n_head"], values["n_kv_head"]
    if values["n_embd"] % heads or heads % kv_heads:
        raise ExportError(
            f"n_embd {values['n_embd']}, n_head {heads} and n_kv_head {kv_heads} do not divide each other"
        )
    for ours in ("rope_base", "norm_eps"):
        value = values.get(ours, 1e-5)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ExportError(f"{ours} is {value!r}; it must be a number above 0")
    family = family_of(config)
    settings = {theirs: values.get(ours, 1e-5) for ours, theirs in family.fields.items()} | family.settings
    if family.position == "rope":
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": float(config["rope_base"])}
        settings[family.biases] = bool(config.get("induction"))
    if family.model_type in ("llama", "qwen3", "arcee"):
        settings["head_dim"] = config["n_embd"] // config["n_head"]
    if family.model_type == "smollm3":
        settings["no_rope_layers"] = [0] * config["n_layer"]
    if family.fields is GPT2_FIELDS:
        settings["n_ctx"] = values["block_size"]  # llama.cpp reads this name
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    made = transformers.AutoConfig.for_model(family.model_type, **ends, **settings)
    if family.model_type == "stablelm":
        made.partial_rotary_factor = 1.0  # llama.cpp looks for it here
    return made


def model_fields(folder: Path) -> dict:
    """The model fields of a Config that a checkpoint's config.json amounts to; see `config_from_hf`."""
    import transformers  # noqa: F401 - where it is missing, that is the error

    path = folder / "config.json"
    if not path.exists() and (folder / "adapter_config.json").exists():
        raise ExportError(f"{folder}: holds an adapter (LoRA); merge it into its base model first: merge_and_unload()")
    if not path.exists():
        raise ExportError(
            f"{str(folder)!r} holds no config.json; init_from takes the folder of a checkpoint, or its hub name"
        )
    raw = read_json(path)
    with told(path, ExportError):
        return _model_fields(folder, raw)


def _model_fields(folder: Path, raw: dict) -> dict:
    import transformers

    types = dict.fromkeys(family.model_type for family in FAMILIES)
    rows = [family for family in FAMILIES if family.model_type == raw.get("model_type")]
    family = max(rows, key=lambda row: raw.items() >= row.settings.items(), default=None)
    if family is None:
        advice = "" if "model_type" in raw else "; export_hf makes such a checkpoint of a run"
        raise ExportError(f"model_type {raw.get('model_type')!r} is not one of {', '.join(types)}{advice}")
    sizes = [*family.fields.items(), ("n_layer", "num_labels")]  # transformers makes a name for each label
    for ours, theirs in sizes:  # before anything is made that is as large as they say
        if ours in SIZES and raw.get(theirs) is not None:
            _check_size(ours, raw[theirs], theirs)
    for part in ("auto_map", "quantization_config"):
        if raw.get(part):
            raise ExportError(f"{part} {json.dumps(raw[part])[:60]} is not supported; plain weights come in")
    with told(folder / "config.json", ExportError, "refused by transformers"):
        theirs = transformers.AutoConfig.from_pretrained(folder).to_dict()
    values = {ours: theirs.get(name) for ours, name in family.fields.items()}
    values |= {part: getattr(family, part) for part in PARTS}
    if "n_kv_head" not in values:
        values["n_kv_head"] = 1 if theirs.get("multi_query") else values["n_head"]
    values["n_ffn"] = values["n_ffn"] or 4 * values["n_embd"]
    values["attention"] = "mha" if values["n_kv_head"] == values["n_head"] else "gqa"
    values["embedding_norm"] = False
    values["induction"] = family.position == "rope" and bool(theirs.get(family.biases))
    rope = theirs.get("rope_parameters") or {}
    values["rope_base"] = rope.get("rope_theta", 10000.0) if family.position == "rope" else 10000.0
    same = to_hf_config(values).to_dict()
    unsaid = {"n_inner": 4 * values["n_embd"], "head_dim": values["n_embd"] // values["n_head"]}
    for name in sorted((set(same) - set(transformers.PreTrainedConfig().to_dict()) - HARMLESS) | {"head_dim"}):
        there, here = (unsaid.get(name) if config.get(name) is None else config[name] for config in (theirs, same))
        if name == "rope_parameters" and family.position != "rope":
            continue  # of layers that all leave it out
        if SAME.get(str(there), there) != SAME.get(str(here), here):
            raise ExportError(
                f"{name} is {str(there)[:120]}, which this stack does not have (it has {str(here)[:120]})"
            )
    return values
