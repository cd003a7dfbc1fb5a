"Jobs of compiled functions on several threads."

import threading
from collections.abc import Callable

import torch


def in_threads(
    task: Callable[..., None],  # must release the interpreter lock to gain anything
    jobs: list[tuple],  # called as task(*job); a thread that is free takes the next one
) -> None:
    "Run every job on as many threads as torch uses, the caller included; none outlives the call."
    queue = iter(jobs)
    errors = []

    def work():
        try:
            for job in queue:
                task(*job)
        except BaseException as error:
            errors.append(error)

    count = min(torch.get_num_threads(), len(jobs)) - 1
    helpers = [threading.Thread(target=work) for _ in range(count)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]
