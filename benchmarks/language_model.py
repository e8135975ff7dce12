"""What a causal language model of 124 million parameters takes: memory of the process, CPU seconds a step.

    python benchmarks/language_model.py            # a Llama of SmolLM2-135M's shape, random weights, LoRA
    python benchmarks/language_model.py all

The tokenizer is MiniLM's (pip install 'atm-fl[text]'), so that the vocabulary is 30,522 and not 49,152 tokens.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

TEXTS = 8
"""Of a step, and of the evaluation."""


def peak() -> float:
    """The process's largest resident memory so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def made(folder: Path) -> Path:
    """A folder with a random Llama and MiniLM's tokenizer."""
    from importlib.util import find_spec

    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from atm_fl.models.texts import BUNDLED

    found = find_spec(BUNDLED[0])
    assert found is not None
    assert found.submodule_search_locations
    tokenizer = AutoTokenizer.from_pretrained(Path(found.submodule_search_locations[0]) / BUNDLED[1])
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main(trainable: str = "lora") -> None:
    """Print a line a part."""
    from atm_fl.federation.client import Party
    from atm_fl.settings import Settings

    with tempfile.TemporaryDirectory() as place:
        os.environ["ATM_FL_CACHE"] = place
        if not (pid := os.fork()):  # making it is none of the party's memory
            made(Path(place) / "model")
            os._exit(0)
        os.waitpid(pid, 0)
        values = {"model": "causal-lm/llama", "weights": f"{place}/model", "head": "answers", "tasks": "reviews"}
        values |= {"trainable": trainable, "batch-size": TEXTS, "threads": torch.get_num_threads()}
        settings = Settings.parse(values)
        party = Party(settings, "reviews")
        model, base, few = party.model, party.model.pretrained, party.tuned_on.take(slice(0, TEXTS))
        own = {name: each for name, each in model.module.lm.named_parameters() if not name.endswith((".0.a", ".0.b"))}
        parameters = sum(each.numel() for each in own.values())  # without lora's
        print(f"{parameters:,} parameters, {model.layout.size:,} elements in a vector, {peak():.1f} GB after loading")
        model.load(base)
        begin = time.process_time()
        model.tune(base, party.head, few, settings, seed=0)
        print(f"a step of {TEXTS} texts: {time.process_time() - begin:.1f} CPU s, {peak():.1f} GB at most")
        begin = time.process_time()
        with torch.inference_mode():
            party.head.logits(model.module, few.images)
        print(f"{TEXTS} texts, {len(party.data.classes)} classes: {time.process_time() - begin:.1f} CPU s")


if __name__ == "__main__":
    main(*sys.argv[1:])
