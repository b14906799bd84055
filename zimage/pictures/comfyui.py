"""ComfyUI's graph, as its pictures carry it: nodes by their number, whose inputs are values or links to other nodes.

    {"3": {"class_type": "KSampler", "inputs": {"seed": 7, "cfg": 1.0, "positive": ["6", 0], "model": ["11", 0], …}}, …}

Nodes are told by their inputs, not by their class: there are hundreds of samplers and text encoders, most of which call
their inputs as ComfyUI's own do. Links are followed a limited number of times, and no node twice: a graph may hold
circles.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from zimage.errors import CheckpointError
from zimage.formats.json_text import json_value
from zimage.pictures.foreign import CFG, Found
from zimage.pictures.texts import LONGEST_GRAPH
from zimage.settings.fields import Plain

Inputs = Mapping[str, Plain]
FARTHEST = 64  # links in a row
TEXTS = ("text", "prompt", "string", "value", "text_g")
VALUES = ("value", "seed", "noise_seed", "int", "float", "number", "string", "text")  # of nodes that hold one value
CONDITIONS = ("conditioning", "conditioning_1", "conditioning_to")
LATENTS = ("latent_image", "samples", "latent", "pixels", "image")
HELPERS = ("guider", "noise", "sampler", "sigmas")  # what SamplerCustomAdvanced delegates to
EMPTIED = "ConditioningZeroOut"  # the empty prompt, whatever text goes in


def parse_graph(text: str) -> Found | None:
    """The settings of a picture's first pass, or None where the text is not such a graph."""
    try:
        graph = Graph(json_value("the graph", text, LONGEST_GRAPH))
    except CheckpointError:  # some programs keep the prompt's words under this name
        return None
    samplers = [node for node in graph.nodes.values() if _is_sampler(node.inputs)]
    if not samplers:
        return None
    sampler = next((node for node in samplers if graph.empty_latent(node)), samplers[0])
    around = [sampler, *filter(None, (graph.linked(sampler.inputs.get(name)) for name in HELPERS))]
    return _found(graph, sampler, around)


@dataclass(frozen=True, eq=False)
class Node:
    """One node of a graph."""

    kind: str
    inputs: Inputs


class Graph:
    """The nodes of a graph; what is not a node is passed over."""

    def __init__(self, content: Plain):
        self.nodes: dict[str, Node] = {}
        for key, node in content.items() if isinstance(content, dict) else ():
            kind, inputs = (node.get("class_type"), node.get("inputs")) if isinstance(node, dict) else (None, None)
            if isinstance(kind, str) and isinstance(inputs, dict):
                self.nodes[key] = Node(kind, inputs)

    def linked(self, value: Plain) -> Node | None:
        """The node that a link leads to; None for values and for links to nowhere."""
        is_link = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int)
        return self.nodes.get(str(value[0])) if is_link else None

    def chain(self, start: Plain, names: tuple[str, ...]) -> Iterator[Node]:
        """The node behind a link and those before it, each behind the first of these inputs that is a link."""
        node, seen = self.linked(start), set[Node]()
        while node is not None and node not in seen and len(seen) < FARTHEST:
            yield node
            seen.add(node)
            links = (self.linked(node.inputs.get(name)) for name in names)
            node = next((link for link in links if link is not None), None)

    def value(self, node: Node, names: tuple[str, ...], kinds: tuple[type, ...]) -> Plain:
        """The first input of these names, there or behind its link; None where it is not of the kinds."""
        for name in names:
            given = node.inputs.get(name)
            values = [given, *(n.inputs.get(v) for n in self.chain(given, (name, *VALUES)) for v in (name, *VALUES))]
            for value in values:
                if isinstance(value, kinds) and not isinstance(value, bool):
                    return value
        return None

    def text(self, link: Plain, role: str) -> str | None:
        """The words of a prompt: those of the nearest node that has some."""
        for node in self.chain(link, (role, *CONDITIONS)):
            if node.kind == EMPTIED:
                return ""
            words = self.value(node, (role, *TEXTS), (str,))
            if words is not None:
                return words
        return None

    def starts_from_picture(self, sampler: Node) -> bool:
        return any("pixels" in node.inputs for node in self.chain(sampler.inputs.get("latent_image"), LATENTS))

    def empty_latent(self, sampler: Node) -> Node | None:
        """The node that says the size, where no other sampler and no picture stands in between."""
        for node in self.chain(sampler.inputs.get("latent_image"), LATENTS):
            if _is_sampler(node.inputs) or "pixels" in node.inputs:
                return None
            if {"width", "height"} <= node.inputs.keys() and not node.inputs.keys() & set(LATENTS):
                return node
        return None


def _is_sampler(inputs: Inputs) -> bool:
    return "guider" in inputs or ("positive" in inputs and bool(inputs.keys() & {"steps", "sigmas"}))


def _found(graph: Graph, sampler: Node, around: list[Node]) -> Found:
    def first(*names: str, kinds: tuple[type, ...]) -> Plain:
        return next((v for node in around if (v := graph.value(node, names, kinds)) is not None), None)

    def link(*names: str) -> Plain:
        return next((node.inputs[name] for node in around for name in names if name in node.inputs), None)

    models = list(graph.chain(link("model"), ("model",)))
    size = graph.empty_latent(sampler)
    values = {
        "prompt": graph.text(link("positive", "conditioning"), "positive"),
        "negative": graph.text(link("negative"), "negative"),
        "steps": first("steps", kinds=(int,)),
        "seed": first("seed", "noise_seed", kinds=(int,)),
        CFG: first("cfg", kinds=(int, float)),
        "width": graph.value(size, ("width",), (int,)) if size else None,
        "height": graph.value(size, ("height",), (int,)) if size else None,
        "shift": next((s for n in models if (s := graph.value(n, ("shift",), (int, float))) is not None), None),
    }
    if values[CFG] is None and "conditioning" in {name for node in around for name in node.inputs}:
        values[CFG] = 1  # a guider with one conditioning has nothing to steer away from
    name = first("sampler_name", kinds=(str,)) or _named_by_class(graph.linked(sampler.inputs.get("sampler")))
    schedule = first("scheduler", kinds=(str,)) or _named_by_class(graph.linked(sampler.inputs.get("sigmas")))
    kept = {name: value for name, value in values.items() if value is not None}
    loras = tuple(line for node in models for line in _loras(node.inputs))
    return Found("ComfyUI's graph", kept, name, schedule, loras, graph.starts_from_picture(sampler))


def _named_by_class(node: Node | None) -> str:
    """The sampler or schedule of a node that is for this one alone: SamplerER_SDE, KarrasScheduler."""
    return node.kind.removeprefix("Sampler").removesuffix("Scheduler") if node else ""


def _loras(inputs: Inputs) -> Iterator[str]:
    """The LoRA files that a node loads, each with its strength; some nodes hold several as objects."""
    entries = [(inputs.get("lora_name"), inputs.get("strength_model", 1))]
    entries += [(v.get("lora"), v.get("strength", 1)) for v in inputs.values() if isinstance(v, dict) and v.get("on")]
    yield from (f"{name}:{strength}" for name, strength in entries if isinstance(name, str))
