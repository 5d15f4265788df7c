"""Drop units by image, whichever rank holds its row."""

import torch
from torch import Tensor, nn

LOW = 0xFFFF_FFFF
# An odd constant whose bits look random: of Mike Mayfield's rrmxmx, a mixer of 64 bits (mostlymangling.blogspot.com).
ODD = 0xD6E8_FEB8_6659_FD93 - 2**64
STEPS = 2**16  # a mask is decided by 16 bits of a hash


class SampleDropout(nn.Module):
    """nn.Dropout, with a mask that depends on the image and not on the rank, its rows or their order.

    While training, a value of the input [N, C] or [N, C, H, W] is dropped with probability `p` (to 16 bits), and scaled
    by 1 / (1 - p) otherwise. Which are dropped is a hash of the image's key, drawn for each epoch, this layer's number
    and the value's place in the row. A layer that is used at two places drops the same at both.
    """

    # The step sets them: the first before each forward pass, the other once.
    row_keys: Tensor | None = None  # [N] int64; where nobody sets it, it is drawn in each pass
    number = 0  # of this layer, among those of the model

    def __init__(self, p: float = 0.5):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"SampleDropout: p must be at least 0 and less than 1, got {p!r}")
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        keys = self.row_keys
        if keys is None:
            keys = torch.randint(2**62, (len(input),), device=input.device)
        bits = random_bits(keys, self.number, self.units(input, len(keys)))
        dropped = min(round(self.p * STEPS), STEPS - 1)
        mask = (bits >= dropped - STEPS // 2).to(input.dtype).mul_(1 / (1 - self.p))
        return input * self.spread(mask, input)

    def units(self, input: Tensor, images: int) -> int:
        """Return how many values of an image are dropped or kept, each by itself."""
        return input.numel() // images  # an image may be several rows, as windows of it are

    def spread(self, mask: Tensor, input: Tensor) -> Tensor:
        """Return a mask [N, units] in a shape that the input can be multiplied with."""
        # Channels last, as convolutions mostly lie: a mask in another format would cost more than it takes to make.
        return mask.view(input.movedim(1, -1).shape).movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class SampleDropPath(SampleDropout):
    """Stochastic depth (Huang et al., arXiv 1603.09382): drop all values of an image, whichever rank holds its row."""

    def units(self, input: Tensor, images: int) -> int:
        return 1

    def spread(self, mask: Tensor, input: Tensor) -> Tensor:
        return mask.view(-1, *[1] * (input.dim() - 1))


def random_bits(keys: Tensor, layer: int, units: int) -> Tensor:
    """Return int16 [N, units], each a hash of the row's key (`keys` [N] int64), the layer and the unit."""
    # One hash of 64 bits serves four units.
    constants = torch.arange(-(-units // 4), device=keys.device) + (layer << 32)
    hashes = _mixed((2 * keys[:, None] + 1) * (_mixed(_mixed(constants)) | 1))
    return hashes.view(torch.int16)[:, :units].contiguous()


def _mixed(numbers: Tensor) -> Tensor:
    """Scatter the bits of int64 numbers, one to one: xor the upper half into the lower, multiply, xor again."""
    numbers = (numbers ^ (numbers >> 32 & LOW)) * ODD  # `>>` repeats the sign
    return numbers ^ (numbers >> 32 & LOW)
