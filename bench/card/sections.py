"""The sections of `bench card` in their order, with the seconds that each may take: 9 minutes in all.

Where a section takes longer, its running row is stopped and fails, and the rows after it are not run.
"""

from bench.card import files, operations, pictures, stages, steps
from bench.card.rows import Section

SECTIONS = (
    Section("tests", "the kernels' tests on this GPU", 60, operations.tests),
    Section("peaks", "what products and copies reach at most", 12, operations.peaks),
    Section("kernels", "every kernel beside its reference", 60, operations.kernels),
    Section("demo", "the demo's pictures in every configuration", 60, pictures.demo),
    Section("steps", "one evaluation of the DiT", 115, steps.steps),
    Section("attention", "a step with every attention", 20, steps.attention),
    Section("packed", "steps from quantised files", 60, files.packed),
    Section("text", "encoding and writing", 15, stages.text),
    Section("decode", "decoding", 13, stages.decode),
    Section("memory", "renders in little memory", 75, files.memory),
    Section("render", "whole renders, process start to picture", 40, files.render),
)
MINUTES = 9
ROW_SECONDS = 60  # the longest that a row may take, in a run of 9 minutes
