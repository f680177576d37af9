import torch

from flsep.trainer.data.buffer import Buffer

SHAPES = {
    "flags": (torch.bool, (3,)),
    "numbers": (torch.int64, (2, 5)),
    "nothing": (torch.float32, (0, 4)),
    "spectra": (torch.float16, (7, 2, 129, 2)),
}


def test_tensors_are_aligned_views_that_do_not_overlap() -> None:
    buffer = Buffer.allocate(SHAPES, pin=False)
    for number, tensor in enumerate(buffer.tensors.values()):
        tensor.fill_(number)
    for number, (name, tensor) in enumerate(buffer.tensors.items()):
        assert (tensor.dtype, tensor.shape) == SHAPES[name]
        assert buffer.layout[name].offset_bytes % 256 == 0
        assert (tensor == number).all()
        assert tensor.untyped_storage().data_ptr() == buffer.memory.data_ptr()


def test_a_layout_finds_the_tensors_in_a_copy() -> None:
    buffer = Buffer.allocate(SHAPES, pin=False)
    buffer.memory.random_(generator=torch.Generator().manual_seed(0))
    copy = Buffer(buffer.memory.clone(), buffer.layout)
    raw = buffer.tensors["spectra"].clone()
    buffer.memory.zero_()
    assert torch.equal(copy.tensors["spectra"].view(torch.int16), raw.view(torch.int16))


def test_a_buffer_on_its_device_is_not_copied() -> None:
    buffer = Buffer.allocate(SHAPES, pin=False)
    assert buffer.to(torch.device("cpu")).memory is buffer.memory
