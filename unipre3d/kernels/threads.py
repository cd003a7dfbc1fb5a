"Jobs of compiled functions on several threads."

import threading
from collections.abc import Callable

import torch


def in_threads(
    task: Callable[..., None],  # must release the interpreter lock to gain anything
    jobs: list[tuple],  # called as task(*job); a thread that is free takes the next one
) -> None:
    """Run every job on as many threads as torch uses, the caller included; none outlives the call.

    After an error or Ctrl-C no other job begins, and it is raised once those under way have ended.
    """
    queue = iter(jobs)
    errors = []

    def work():
        try:
            for job in queue:
                if errors:
                    return
                task(*job)
        except BaseException as error:
            errors.append(error)

    count = min(torch.get_num_threads(), len(jobs)) - 1
    helpers = [threading.Thread(target=work) for _ in range(count)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        while helper.is_alive():
            try:
                helper.join()
            except KeyboardInterrupt as error:
                errors.append(error)
    if errors:
        raise errors[0]
