"""The sections of `bench card` in their order, with the seconds that each may take: 10 minutes in all.

Where a section takes longer, its running row is stopped and fails, and the rows after it are not run.
"""

from bench.card import files, operations, pictures, stages, steps
from bench.card.rows import Section

SECTIONS = (
    Section("tests", "the kernels' tests on this GPU", 80, operations.tests),
    Section("peaks", "what products and copies reach at most", 12, operations.peaks),
    Section("kernels", "every kernel beside its reference", 45, operations.kernels),
    Section("demo", "the demo's pictures in every configuration", 80, pictures.demo),
    Section("steps", "one evaluation of the DiT", 110, steps.steps),
    Section("attention", "a step with every attention", 20, steps.attention),
    Section("packed", "steps from quantised files", 40, files.packed),
    Section("text", "encoding and writing", 15, stages.text),
    Section("decode", "decoding", 13, stages.decode),
    Section("memory", "renders in little memory", 75, files.memory),
    Section("render", "whole renders, process start to picture", 100, files.render),
)
MINUTES = 10
ROW_SECONDS = 60  # the longest that a row may take, in a run of 10 minutes
