"""What the demo model can draw: object names with their emoji, colours, and the words people may use for them."""

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (240, 140, 40),
    "yellow": (250, 220, 80),
    "green": (60, 160, 80),
    "blue": (50, 100, 210),
    "purple": (125, 70, 170),
    "pink": (250, 170, 200),
    "white": (250, 250, 250),
    "black": (20, 20, 24),
    "gray": (140, 145, 150),
}

COLOUR_SYNONYMS = {"gray": ("grey",), "purple": ("violet",)}

# Drawn as faces, so that "a cat face" and "a cat" name the same picture.
FACES = {
    "cat": "🐱",
    "dog": "🐶",
    "mouse": "🐭",
    "rabbit": "🐰",
    "fox": "🦊",
    "bear": "🐻",
    "panda": "🐼",
    "tiger": "🐯",
    "lion": "🦁",
    "cow": "🐮",
    "pig": "🐷",
    "frog": "🐸",
    "monkey": "🐵",
    "koala": "🐨",
    "horse": "🐴",
    "dragon": "🐲",
    "unicorn": "🦄",
}

ANIMALS = {
    "penguin": "🐧",
    "owl": "🦉",
    "turtle": "🐢",
    "octopus": "🐙",
    "crab": "🦀",
    "fish": "🐠",
    "dolphin": "🐬",
    "whale": "🐳",
    "shark": "🦈",
    "butterfly": "🦋",
    "bee": "🐝",
    "ladybug": "🐞",
    "elephant": "🐘",
    "chicken": "🐔",
    "snail": "🐌",
    "snake": "🐍",
}

FOOD = {
    "red apple": "🍎",
    "green apple": "🍏",
    "banana": "🍌",
    "strawberry": "🍓",
    "cherries": "🍒",
    "grapes": "🍇",
    "watermelon": "🍉",
    "lemon": "🍋",
    "pineapple": "🍍",
    "peach": "🍑",
    "carrot": "🥕",
    "corn": "🌽",
    "broccoli": "🥦",
    "mushroom": "🍄",
    "avocado": "🥑",
    "pizza": "🍕",
    "hamburger": "🍔",
    "doughnut": "🍩",
    "cookie": "🍪",
    "lollipop": "🍭",
    "cupcake": "🧁",
    "birthday cake": "🎂",
    "ice cream": "🍦",
    "cheese": "🧀",
}

FIGURES = {
    "happy face": "😀",
    "cool face": "😎",
    "robot": "🤖",
    "ghost": "👻",
    "skull": "💀",
    "alien": "👽",
    "pumpkin": "🎃",
    "snowman": "⛄",
}

NATURE = {
    "heart": "❤️",
    "star": "⭐",
    "moon": "🌙",
    "sun": "☀️",
    "cloud": "☁️",
    "fire": "🔥",
    "rainbow": "🌈",
    "tree": "🌳",
    "palm tree": "🌴",
    "cactus": "🌵",
    "sunflower": "🌻",
    "rose": "🌹",
}

THINGS = {
    "car": "🚗",
    "bus": "🚌",
    "bicycle": "🚲",
    "train": "🚂",
    "rocket": "🚀",
    "helicopter": "🚁",
    "sailboat": "⛵",
    "house": "🏠",
    "soccer ball": "⚽",
    "basketball": "🏀",
    "guitar": "🎸",
    "balloon": "🎈",
    "gift": "🎁",
    "crown": "👑",
    "bell": "🔔",
    "umbrella": "☔",
    "alarm clock": "⏰",
    "camera": "📷",
    "diamond": "💎",
}

OBJECTS: dict[str, str] = {**FACES, **ANIMALS, **FOOD, **FIGURES, **NATURE, **THINGS}

SYNONYMS: dict[str, tuple[str, ...]] = {
    "cat": ("kitty", "kitten"),
    "dog": ("puppy",),
    "rabbit": ("bunny",),
    "ladybug": ("ladybird",),
    "red apple": ("apple",),
    "hamburger": ("burger",),
    "doughnut": ("donut",),
    "ice cream": ("ice-cream",),
    "happy face": ("smiley", "smiley face"),
    "cool face": ("face with sunglasses",),
    "bicycle": ("bike",),
    "train": ("locomotive",),
    "sailboat": ("boat",),
    "soccer ball": ("football",),
    "gift": ("present",),
    "diamond": ("gem",),
    "fire": ("flame",),
    "alarm clock": ("clock",),
    "snowman": ("snow man",),
    "fish": ("tropical fish",),
}

# Only what the rule in `plural` below gets wrong.
IRREGULAR_PLURALS = {
    "mouse": "mice",
    "fish": "fish",
    "cherries": "cherries",
    "grapes": "grapes",
    "broccoli": "broccoli",
    "cheese": "cheeses",
    "snowman": "snowmen",
}


def plural(name: str) -> str:
    """The plural of an object's name: "fox" → "foxes", "strawberry" → "strawberries"."""
    if name in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def article(phrase: str) -> str:
    """The phrase with its indefinite article; plural names take none."""
    if phrase in ("cherries", "grapes", "broccoli"):
        return phrase
    return ("an " if phrase[0] in "aeio" or phrase == "umbrella" else "a ") + phrase
