"""The order of a step's examples in which every mini-batch, and every process's part of it, has the task shares of the whole step."""

from __future__ import annotations

from collections.abc import Sequence

from ..model.records import Example


def stratified(examples: Sequence[Example], *, num_mini_batches: int) -> list[Example]:
    """Returns the examples in an order whose `num_mini_batches` equal parts each have every task's share, to within one row.

    A task with n rows in the step has floor(n / parts) or ceil(n / parts) of them in each part. The same holds for every r-th row of
    a part, which is what one of r processes gets. Qwen3-VL holds a constant ratio of tasks in its batches (arXiv:2511.21631, 4.4.1);
    that a mini-batch has it as well is our choice. Rows of one task alone keep their order.
    """
    tasks = list(dict.fromkeys(example.task for example in examples))
    if len(tasks) < 2:
        return list(examples)
    by_task = sorted(examples, key=lambda example: tasks.index(example.task))
    return [example for part in range(num_mini_batches) for example in by_task[part::num_mini_batches]]
