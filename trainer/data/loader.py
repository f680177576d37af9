"""Read the batches of an epoch ahead of their use."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from flsep.cache import Draw
from flsep.trainer.data.batch import Batch
from flsep.trainer.data.excerpts import Excerpts
from flsep.trainer.data.reader import Reader
from flsep.trainer.parallel import Rank

_BATCHES_AHEAD = 2


class _Transfer:
    """Moves batches to a GPU on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        """Start to copy a batch; the event tells when it is copied."""
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device)
            return moved, self._stream.record_event()

    def finish(self, batch: Batch, copied: torch.cuda.Event) -> Batch:
        """Make the consumer's stream wait for the copy."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)
        # The allocator must not give the memory to another copy while this stream reads it.
        batch.buffer.memory.record_stream(stream)
        return batch


def load_batches(
    reader: Reader,
    excerpts: Excerpts,
    *,
    epoch: int,
    batch_size: int,
    num_workers: int,
    first: int = 0,
    rank: Rank = Rank(),  # noqa: B008 - immutable
    device: torch.device | None = None,
) -> Generator[Batch, None, None]:
    """Read the batches of an epoch in order, from number `first` on, a few ahead of their use.

    `rank` reads its share of each batch of `excerpts`; a batch with an empty share is left out.
    With 0 workers, a batch is read when it is asked for; the batches are the same.

    On a GPU, `next` makes the current stream wait for the copy of the batch, which mostly has
    finished long before. CUDA events recorded on that stream before and after `next` tell how long
    the device waited, for the copy or for the excerpts themselves. A damaged shard raises
    CacheError when its batch is due.
    """
    transfer = _Transfer(device) if device is not None and device.type == "cuda" else None

    def plan() -> Iterator[tuple[Batch, list[Draw]]]:
        for number in range(first, -(-len(excerpts) // batch_size)):
            whole = range(number * batch_size, min((number + 1) * batch_size, len(excerpts)))
            draws = [excerpts.draw(epoch, index) for index in rank.share(whole)]
            if draws:
                pin = transfer is not None
                yield reader.allocate(draws, pin=pin, num_in_all=len(whole)), draws

    def complete(
        batch: Batch, filling: list[Future[None]]
    ) -> tuple[Batch, torch.cuda.Event | None]:
        for excerpt in filling:
            # This also raises what went wrong in the thread that read the excerpt.
            excerpt.result()
        return (batch, None) if transfer is None else transfer.start(batch)

    def hand_over(batch: Batch, copied: torch.cuda.Event | None) -> Batch:
        return batch if transfer is None or copied is None else transfer.finish(batch, copied)

    if num_workers == 0:  # no threads: easier to debug
        for batch, draws in plan():
            for slot, draw in enumerate(draws):
                reader.fill(batch, slot, draw)
            yield hand_over(*complete(batch, []))
        return
    # A batch goes on to the device in a thread of its own, so that no reader waits for the others.
    readers = ThreadPoolExecutor(num_workers, thread_name_prefix="flsep-read")
    completer = ThreadPoolExecutor(1, thread_name_prefix="flsep-read")
    ahead: deque[Future[tuple[Batch, torch.cuda.Event | None]]] = deque()
    try:
        for batch, draws in plan():
            filling = [
                readers.submit(reader.fill, batch, slot, draw) for slot, draw in enumerate(draws)
            ]
            ahead.append(completer.submit(complete, batch, filling))
            del batch, filling  # only the future keeps the batch alive
            # The number of batches ahead bounds the memory of the buffers.
            if len(ahead) > _BATCHES_AHEAD:
                yield hand_over(*ahead.popleft().result())
        while ahead:
            yield hand_over(*ahead.popleft().result())
    finally:
        # The consumer may stop early: leave the excerpts that no thread has begun.
        readers.shutdown(cancel_futures=True)
        completer.shutdown(cancel_futures=True)
