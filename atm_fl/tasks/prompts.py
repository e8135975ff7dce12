"""Class names and sentence templates for text heads: data, as published with CLIP.

From `data/prompts.md` of github.com/openai/CLIP (MIT), its spelling included ("horizonal", "bicyle"). CLIP has none for
EMNIST, Fashion-MNIST and KMNIST: those are the ones of the 20-task suite (TALL masks, arXiv:2405.07813). Names that are
the data set's own with spaces for underscores are not listed; they are read with the data.
"""

from __future__ import annotations

DIGITS = tuple("0123456789")

EUROSAT = {  # folder: CLIP's name
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road",
    "Industrial": "industrial buildings or commercial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings or homes or apartments",
    "River": "river",
    "SeaLake": "lake or sea",
}

GTSRB = (
    "red and white circle 20 kph speed limit",
    "red and white circle 30 kph speed limit",
    "red and white circle 50 kph speed limit",
    "red and white circle 60 kph speed limit",
    "red and white circle 70 kph speed limit",
    "red and white circle 80 kph speed limit",
    "end / de-restriction of 80 kph speed limit",
    "red and white circle 100 kph speed limit",
    "red and white circle 120 kph speed limit",
    "red and white circle red car and black car no passing",
    "red and white circle red truck and black car no passing",
    "red and white triangle road intersection warning",
    "white and yellow diamond priority road",
    "red and white upside down triangle yield right-of-way",
    "stop",
    "empty red and white circle",
    "red and white circle no truck entry",
    "red circle with white horizonal stripe no entry",
    "red and white triangle with exclamation mark warning",
    "red and white triangle with black left curve approaching warning",
    "red and white triangle with black right curve approaching warning",
    "red and white triangle with black double curve approaching warning",
    "red and white triangle rough / bumpy road warning",
    "red and white triangle car skidding / slipping warning",
    "red and white triangle with merging / narrow lanes warning",
    "red and white triangle with person digging / construction / road work warning",
    "red and white triangle with traffic light approaching warning",
    "red and white triangle with person walking warning",
    "red and white triangle with child and person walking warning",
    "red and white triangle with bicyle warning",
    "red and white triangle with snowflake / ice warning",
    "red and white triangle with deer warning",
    "white circle with gray strike bar no speed limit",
    "blue circle with white right turn arrow mandatory",
    "blue circle with white left turn arrow mandatory",
    "blue circle with white forward arrow mandatory",
    "blue circle with white forward or right turn arrow mandatory",
    "blue circle with white forward or left turn arrow mandatory",
    "blue circle with white keep right arrow mandatory",
    "blue circle with white keep left arrow mandatory",
    "blue circle with white arrows indicating a traffic circle",
    "white circle with gray strike bar indicating no passing for cars has ended",
    "white circle with gray strike bar indicating no passing for trucks has ended",
)

FER2013 = (  # several wordings of one class
    "angry",
    "disgusted",
    "fearful",
    "happy; smiling",
    "sad; depressed",
    "surprised; shocked; spooked",
    "neutral; bored",
)

PCAM = ("lymph node", "lymph node containing metastatic tumor tissue")

FASHIONMNIST = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

KMNIST = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")

_CIFAR = tuple(
    template.replace("ARTICLE", article)
    for article in ("a", "the")
    for template in (
        "a photo of ARTICLE {}.",
        "a blurry photo of ARTICLE {}.",
        "a black and white photo of ARTICLE {}.",
        "a low contrast photo of ARTICLE {}.",
        "a high contrast photo of ARTICLE {}.",
        "a bad photo of ARTICLE {}.",
        "a good photo of ARTICLE {}.",
        "a photo of ARTICLE small {}.",
        "a photo of ARTICLE big {}.",
    )
)
_NUMBER = ('a photo of the number: "{}".',)
_PLAIN = ("a photo of a {}.", "a photo of the {}.")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "cars": (
        *_PLAIN,
        "a photo of my {}.",
        "i love my {}!",
        "a photo of my dirty {}.",
        "a photo of my clean {}.",
        "a photo of my new {}.",
        "a photo of my old {}.",
    ),
    "dtd": tuple(
        f"a photo of {article} {{}} {noun}."
        for article in ("a", "the")
        for noun in ("texture", "pattern", "thing", "object")
    ),
    "eurosat": tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")),
    "gtsrb": tuple(f'a {view} photo of a "{{}}" traffic sign.' for view in ("zoomed in", "centered", "close up")),
    "mnist-full": _NUMBER,
    "resisc45": tuple(
        f"{height} {view} of {article}{{}}."
        for article in ("", "a ", "the ")
        for view in ("imagery", "photo", "view")
        for height in ("satellite", "aerial")
    ),
    "svhn": _NUMBER,
    "sun397": _PLAIN,
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "stl10": _PLAIN,
    "food101": ("a photo of {}, a type of food.",),
    "pets": ("a photo of a {}, a type of pet.",),
    "flowers102": ("a photo of a {}, a type of flower.",),
    "fer2013": (
        "a photo of a {} looking face.",
        "a photo of a face showing the emotion: {}.",
        "a photo of a face looking {}.",
        "a face that looks {}.",
        "they look {}.",
        "look at how {} they are.",
    ),
    "pcam": ("this is a photo of {}",),
    "emnist": ('a photo of the digit character: "{}".',),
    "fashionmnist": _PLAIN,
    "kmnist": ("a photo of the character {}.",),
    "sst2": ("a {} review of a movie.",),
}
