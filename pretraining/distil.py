"""Pretrain `vit_micro`: distil DINOv2-S/14 (56 px, 12 blocks) into it on images of none of the tasks.

    pretraining/fetch.sh /tmp/corpus
    python pretraining/distil.py /tmp/corpus --out atm_fl/weights/vit_micro.safetensors

Student tokens (class token and 16 patches, mapped to the teacher's width by a linear layer that is then dropped) learn
the teacher's final normalised tokens by cosine distance; both see the same crop, the student at 32 px, the teacher at
56 px, so that their 4 x 4 patches coincide. Prints the loss as it goes and the seconds at the end.
"""

from __future__ import annotations

import argparse
import gzip
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from atm_fl import models
from atm_fl.tasks.glyphs import icon_font, render
from atm_fl.tasks.photos import package_dir

SIZE = 56
FASHION = 10_000
HANGUL = 5_000
CROPS = {"emoji": 2, "openclipart": 2, "tuxpaint": 4, "wesnoth": 1, "fashion": 1}


def crop(image: Image.Image, random: np.random.Generator, whole: bool) -> np.ndarray:
    """A square RGB crop [56, 56, 3], on a random grey where the image is transparent."""
    image = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, (*[int(random.integers(256))] * 3, 255))
    image = Image.alpha_composite(ground, image).convert("RGB")
    side = max(image.size) if whole else int(min(image.size) * random.uniform(0.4, 1.0))
    left = int(random.integers(min(0, image.width - side), max(0, image.width - side) + 1))
    top = int(random.integers(min(0, image.height - side), max(0, image.height - side) + 1))
    return np.asarray(image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def corpus(folder: Path, random: np.random.Generator) -> Tensor:
    """All crops, uint8 [n, 3, 56, 56]."""
    crops: list[np.ndarray] = []
    files = [file for file in sorted(folder.rglob("*.png")) if "/64/" in str(file) or "emoji" not in str(file)]
    for file in files:
        times = next((n for source, n in CROPS.items() if source in str(file)), 0)
        try:
            with Image.open(file) as image:
                if min(image.size) < 24 or max(image.size) > 2000:
                    continue
                crops += [crop(image, random, whole=number == 0) for number in range(times)]
        except (OSError, Image.DecompressionBombError) as error:
            print(f"left out {file}: {error}")
    (fashion,) = folder.rglob("train-images-idx3-ubyte.gz")
    pixels = np.frombuffer(gzip.decompress(fashion.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
    crops += [crop(Image.fromarray(image), random, whole=True) for image in random.permutation(pixels)[:FASHION]]
    crops += glyphs(np.random.default_rng(1))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def glyphs(random: np.random.Generator) -> list[np.ndarray]:
    """White on black [56, 56, 3]: Hangul and kana (Noto Sans CJK in any weight) and four icon fonts.

    The tasks use other characters of the one font and other icon fonts.
    """
    letters = [chr(code) for code in random.permutation(np.arange(0xAC00, 0xD7A4))[:HANGUL]]
    letters += [chr(code) for code in (*range(0x3041, 0x3097), *range(0x30A1, 0x30FB)) for _ in range(4)]
    file = package_dir("manimgx_fonts_cjk") / "NotoSansCJK-VF.otf.ttc"
    images = render(letters, file, random.integers(100, 901, len(letters)).tolist(), SIZE)
    for name in ("fontawesome6-solid-webfont", "remixicon", "elusiveicons-webfont", "codicon"):
        file, characters = icon_font(name)
        images += render(list(characters.values()), file, size=SIZE)
    return [np.repeat(image[..., None], 3, axis=2) for image in images]


@torch.inference_mode()
def teach(images: Tensor) -> Tensor:
    """The teacher's final tokens, float16 [n, 17, 384], normalised."""
    teacher = models.load_backbone("dinov2_s12")
    tokens = []
    for number, batch in enumerate(images.split(64)):
        tokens.append(functional.normalize(teacher.vit.forward_features(teacher.normalise(batch)), dim=-1).half())
        if number % 100 == 0:
            print(f"teacher: {64 * number} of {len(images)} images", flush=True)
    return torch.cat(tokens)


def distil(images: Tensor, tokens: Tensor, minutes: float, seed: int) -> models.Backbone:
    """Train the student for `minutes`: AdamW, batch 128, cosine schedule from 2e-3 over the time budget."""
    torch.manual_seed(seed)
    student = models.untrained_vit_micro()
    width = student.vit.embed_dim
    to_teacher = torch.nn.Linear(width, tokens.shape[-1])
    small = functional.interpolate(images.float(), size=32, mode="bicubic", antialias=True).clamp(0, 255).byte()
    average = tokens.float().mean((0, 1))
    optimizer = torch.optim.AdamW([*student.parameters(), *to_teacher.parameters()], lr=2e-3, weight_decay=0.05)
    begin, step, seen, losses = time.monotonic(), 0, 0, []
    while (progress := (time.monotonic() - begin) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 200) * (1 + math.cos(math.pi * progress)) / 2
        chosen = torch.randint(len(images), (128,))
        predicted = to_teacher(student.vit.forward_features(student.normalise(small[chosen])))
        target = tokens[chosen].float() - average
        distance = 1 - functional.cosine_similarity(predicted, target, dim=-1)
        loss = distance[:, 0].mean() + distance[:, 1:].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        step, seen = step + 1, seen + 128
        if step % 200 == 0:
            print(f"step {step}: loss {np.mean(losses[-200:]):.4f}, {100 * progress:.0f} % of the time", flush=True)
    print(f"{step} steps, {seen} images, final loss {np.mean(losses[-200:]):.4f}")
    return student.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="the folder that pretraining/fetch.sh filled")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=14)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begin = time.monotonic()
    cache = args.corpus / "teacher.pt"
    if cache.exists():
        images, tokens = torch.load(cache)
    else:
        images = corpus(args.corpus, np.random.default_rng(args.seed))
        print(f"{len(images)} crops")
        tokens = teach(images)
        torch.save((images, tokens), cache)
    student = distil(images, tokens, args.minutes, args.seed)
    save_file(student.vit.state_dict(), str(args.out))
    print(f"{args.out}: {sum(p.numel() for p in student.parameters())} parameters, {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
