"""What requests may hold, as JSON Schema made from the one declaration: for the description of the forms and the page.

A declared field that is added appears in every body here, and so in OpenAPI, in the page's form and in the clients.
"""

from collections.abc import Collection, Mapping, Sequence

from zimage.serve.about import About
from zimage.serve.asking import ATTACHMENTS, CONDITIONS, LORA, MOST_LORAS, REQUEST, REWRITE, WRITTEN
from zimage.serve.conditions import MODEL, PICTURE
from zimage.settings.captions import TextSettings
from zimage.settings.conditions import MAX_CONTROL_SCALE, names_of
from zimage.settings.declared import MAX_SIDE, SIZE_MULTIPLE, Request
from zimage.settings.fields import Plain, Settings, json_schema
from zimage.settings.guiding import METHODS
from zimage.settings.names import SAMPLER_NAMES, SCHEDULE_NAMES
from zimage.settings.presets import PRESETS as BY_NAME
from zimage.settings.rewriting import RewriteSettings
from zimage.settings.serving import ServeSettings
from zimage.version import __version__

Schema = dict[str, Plain]

SQUARES = (512, 768, 1024, 1280)
LANDSCAPES = ((1024, 768), (1280, 720), (1024, 576), (1152, 896), (1216, 832))
PRESETS = [*((side, side) for side in SQUARES), *LANDSCAPES, *((height, width) for width, height in LANDSCAPES)]
UPLOADED = {
    "image": "Picture to start from, instead of pure noise",
    "mask": "Mask of the image: white areas are repainted",
    "embeddings": "Caption embeddings that save-embeddings gave, in place of a prompt",
    "reference": "Pictures that the prompt's caption is mixed with, each by its alpha, from 0 to 1",
    "control": "Pictures that ControlNets of this server follow, each with its model and the scale of its hints",
}
SIGHT = ("vision_text", "vision_layer", "vision_tokens")
NUMBERS = {"alpha": 1.0, "scale": MAX_CONTROL_SCALE}  # of conditions, from 0
SMALL_PNG = (  # 16 × 16 px of one colour
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAGUlEQVR4nGPUiFrAQApgIkn1qIZRDUNKAwCpoQFCcQgOjQAAAABJRU5ErkJggg=="
)
EXAMPLE = {"prompt": "a lighthouse at dusk, waves, warm light in the window", "seed": 42}
FILE: Schema = {"type": "string", "format": "binary"}
PROMPT: Schema = {"type": "string", "description": "What to draw."}
LORA_SCHEMA: Schema = {
    "description": "LoRAs of the server by name, each as NAME or NAME:SCALE.",
    "type": ["array", "null"],
    "items": {"type": "string"},
    "maxItems": MOST_LORAS,
    "default": None,
    "x-group": "Model",
}


def described(
    about: About,
    settings: ServeSettings,
    defaults: Mapping[str, Plain],
    loras: Sequence[str],
    controls: Sequence[str],
    presets: Collection[str] = (),
) -> Schema:
    """What a page needs to ask for pictures: fields, defaults, limits, the model, the files that it may name.

    `defaults` are the server's own, and come before the model's; `presets` those of its settings file.
    """
    return {
        "request": _with_presets(drawing_schema(settings, controls), presets),
        "rewrite": rewriting_schema(settings),
        "lora": {"names": list(loras)},
        "control": {"names": list(controls)},
        "vision": {"available": bool(about.vision), **about.vision},
        "defaults": {**about.defaults, **{name: value for name, value in defaults.items() if value is not None}},
        "limits": limits(settings, about.token_limit),
        "model": {"name": about.model["name"], "is_demo": about.model["is_demo"]},
        "dtype": about.dtype,
        "device": about.device,
        "presets": [list(size) for size in PRESETS],
        "version": __version__,
    }


def limits(settings: ServeSettings, token_limit: int) -> dict[str, int]:
    """The most that one job may have."""
    return {
        "max_pixels": settings.max_pixels,
        "max_images": settings.max_images,
        "max_steps": settings.max_steps,
        "max_upload_bytes": settings.max_upload << 20,
        "max_decoded_pixels": settings.max_decoded,
        "size_multiple": SIZE_MULTIPLE,
        "max_side": MAX_SIDE,
        "token_limit": token_limit,
    }


def drawing_schema(settings: ServeSettings, controls: Sequence[str] | None = None) -> Schema:
    """JSON Schema of Request, with this server's limits and files as they come over the network.

    `controls` are the names that a control's model may have, where they are known.
    """
    schema = json_schema(Request)
    fields = {**schema["properties"], **{name: attachment_schema(name) for name in ATTACHMENTS}}
    fields |= {name: conditions_schema(name, settings.max_conditions, controls) for name in CONDITIONS}
    fields["steps"] = {**fields["steps"], "maximum": min(fields["steps"]["maximum"], settings.max_steps)}
    fields["images"] = {**fields["images"], "maximum": min(fields["images"]["maximum"], settings.max_images)}
    for name, table in {"sampler": SAMPLER_NAMES, "schedule": SCHEDULE_NAMES}.items():
        fields[name] = {**fields[name], "x-labels": {ours: names.label for ours, names in table.items()}}
    fields["guidance_method"] = {**fields["guidance_method"], "examples": list(METHODS)}
    return {**schema, "properties": fields}


def _with_presets(schema: Schema, own: Collection[str]) -> Schema:
    """The names that `preset` may have, where they are known."""
    fields = schema["properties"]
    preset = {**fields["preset"], "enum": [*BY_NAME, *own, None]}
    return {**schema, "properties": {**fields, "preset": preset}}


def rewriting_schema(settings: ServeSettings) -> Schema:
    """JSON Schema of RewriteSettings, as far as a request may set them, with this server's limits."""
    schema = json_schema(RewriteSettings)
    fields = {name: schema["properties"][name] for name in REWRITE}
    fields[WRITTEN] = {**fields[WRITTEN], "maximum": min(fields[WRITTEN]["maximum"], settings.max_prompt_tokens)}
    return {**schema, "properties": fields}


def attachment_schema(name: str) -> Schema:
    """A file inside a JSON body."""
    field = json_schema(Request)["properties"][name]
    return {**field, "contentEncoding": "base64", "description": f"{UPLOADED[name]}: base64 or a data URL."}


def conditions_schema(name: str, most: int, models: Sequence[str] | None) -> Schema:
    """Pictures with values of their own inside a JSON body; one without its picture takes the next file beside it."""
    kind, field = CONDITIONS[name], json_schema(Request)["properties"][name]
    picture = {"type": ["string", "null"], "contentEncoding": "base64", "description": "base64 or a data URL."}
    known = {} if models is None else {"enum": list(models)}
    parts: dict[str, Schema] = {PICTURE: picture, MODEL: {"type": "string", "description": "Its name.", **known}}
    for part, highest in NUMBERS.items():
        if part in names_of(kind):
            usual = kind.__dataclass_fields__[part].default
            parts[part] = {"type": "number", "minimum": 0, "maximum": highest, "default": usual}
    needed = [MODEL] if MODEL in kind.FILES else []
    entry = whole("", {part: parts[part] for part in names_of(kind)}, needed)
    return {**field, "description": f"{UPLOADED[name]}.", "items": entry, "maxItems": most}


def sight_fields() -> dict[str, Schema]:
    """How a picture is looked at."""
    fields = json_schema(Request)["properties"]
    return {name: fields[name] for name in SIGHT}


def own_fields(settings: ServeSettings) -> dict[str, Schema]:
    """Everything that a request for pictures may set under our own names."""
    drawing, rewriting = drawing_schema(settings)["properties"], rewriting_schema(settings)["properties"]
    return {**drawing, **rewriting, LORA: LORA_SCHEMA}


def drawing_body(settings: ServeSettings) -> Schema:
    """The body of a request for pictures in our own form."""
    return whole("Drawing", own_fields(settings), example=EXAMPLE)


def drawing_parts(body: Schema) -> Schema:
    """The same as multipart: the values as JSON in one part, files in others."""
    files = {name: {**FILE, "description": f"{UPLOADED[name]}."} for name in ATTACHMENTS}
    files |= {name: {"type": "array", "items": FILE, "description": f"{UPLOADED[name]}."} for name in CONDITIONS}
    request = {**body, "contentMediaType": "application/json"}
    return whole("DrawingParts", {"request": request, **files}, needed=("request",))


def text_body(title: str, extra: Sequence[type[Settings]] = ()) -> Schema:
    """The body of a question on one prompt: with the settings of texts, or with others in their place."""
    settings = extra or (TextSettings,)
    fields = {name: field for one in settings for name, field in json_schema(one)["properties"].items()}
    allowed = {name: field for name, field in fields.items() if name in (*REQUEST, *REWRITE)}
    return whole(title, {"prompt": PROMPT, **allowed}, needed=("prompt",), example={"prompt": EXAMPLE["prompt"]})


def whole(
    title: str,
    properties: Mapping[str, Schema],
    needed: Sequence[str] = (),
    example: Mapping[str, Plain] | None = None,
    others: bool = False,
) -> Schema:
    """The schema of an object; with `others`, of one that may hold more than what is named."""
    schema: Schema = {**({"title": title} if title else {}), "type": "object", "properties": dict(properties)}
    required = {"required": list(needed)} if needed else {}
    return {**schema, **required, "additionalProperties": others, **({"examples": [dict(example)]} if example else {})}
