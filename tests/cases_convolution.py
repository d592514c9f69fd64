"""Cases of convolutions: 1, 2 and 3 axes, plain and transposed, groups, strides, dilations and every padding."""

import torch
from cases import Case, Head, Net, normal, registry
from torch import nn

CASES, case = registry()
SPACE = {1: (9,), 2: (6, 5), 3: (4, 5, 3)}
PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
EVEN = "Using padding='same' with even kernel lengths"


def add(dimensions: int, name: str, transposed: bool = False, warning: str | None = None, **options) -> None:
    """A convolution of 4 channels into 4 and a head."""
    kernel = options.pop("kernel_size", 3 if dimensions < 3 else 2)
    layer = (TRANSPOSED if transposed else PLAIN)[dimensions]
    how = {"conv": "factors"}
    if transposed and options.get("bias", True):
        how["conv.bias"] = "affine"

    def build() -> nn.Module:
        return Net(lambda m, x: m.head(m.conv(x)), conv=layer(4, 4, kernel, **options), head=Head(4))

    kind = f"conv transpose {dimensions}d" if transposed else f"conv {dimensions}d"
    CASES.append(Case(f"{kind}, {name}", build, normal(4, *SPACE[dimensions]), how=how, warning=warning))


for d in (1, 2, 3):
    add(d, "plain")
    add(d, "2 groups", groups=2, padding=1)
    add(d, "4 groups", groups=4, bias=False)
    add(d, "stride and padding", stride=2, padding=1)
    add(d, "dilation", kernel_size=2, dilation=2, padding=1)
    add(d, "same", padding="same", dilation=2, kernel_size=3)
    add(d, "same, even kernel", padding="same", kernel_size=2, warning=EVEN)
    add(d, "valid", padding="valid", stride=2)
    for mode in ("reflect", "replicate", "circular"):
        add(d, mode, padding_mode=mode, padding=1, stride=2)
    add(d, "circular, same, 2 groups", padding_mode="circular", padding="same", kernel_size=3, groups=2)
    add(d, "plain", transposed=True)
    add(d, "stride and padding", transposed=True, stride=2, padding=1)
    add(d, "output padding", transposed=True, stride=3, padding=1, output_padding=2)
    add(d, "output padding beyond the stride", transposed=True, kernel_size=2, dilation=3, output_padding=2)
    add(d, "2 groups, dilation", transposed=True, groups=2, dilation=2)
    add(d, "4 groups, no bias", transposed=True, groups=4, stride=2, bias=False)

add(1, "one window", kernel_size=9)
add(2, "1 x 1", kernel_size=1)
add(2, "unequal everything", kernel_size=(2, 3), stride=(1, 2), padding=(2, 1), dilation=(2, 1))
add(2, "stride beyond the kernel", kernel_size=2, stride=3)
add(
    2,
    "unequal everything",
    transposed=True,
    kernel_size=(2, 3),
    stride=(1, 2),
    padding=(0, 1),
    output_padding=(0, 1),
)


@case(normal(4, 8, 7), how={"first": "factors", "second": "factors"})
def depthwise_separable():
    def forward(m, x):
        return m.head(m.second(m.first(x).relu()))

    first = nn.Conv2d(4, 8, 3, padding=1, groups=4)  # two kernels a channel
    return Net(forward, first=first, second=nn.Conv2d(8, 5, 1), head=Head(5))


@case(normal(3, 2, 6, 6))
def frames_merged_into_the_batch():
    def forward(m, x):
        maps = m.conv(x.flatten(0, 1))
        return m.head(maps.unflatten(0, x.shape[:2]).sum(1))

    return Net(forward, conv=nn.Conv2d(2, 4, 3, stride=2), head=Head(4))


def channels_last(n: int, generator: torch.Generator) -> torch.Tensor:
    return normal(4, 6, 5)(n, generator).to(memory_format=torch.channels_last)


@case(channels_last, how={"conv": "factors", "up": "factors"})
def channels_last_input():
    def forward(m, x):
        return m.head(m.up(m.conv(x.contiguous(memory_format=torch.channels_last)).relu()))

    return Net(
        forward, conv=nn.Conv2d(4, 6, 3, groups=2), up=nn.ConvTranspose2d(6, 4, 2, stride=2), head=Head(4)
    )


@case(normal(4, 6, 5))
def channels_last_weights():
    conv = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
    return Net(lambda m, x: m.head(m.conv(x)), conv=conv, head=Head(4))


@case(normal(2, 9), longer=normal(2, 14))
def maps_of_any_size():
    return Net(lambda m, x: m.head(m.conv(x)), conv=nn.Conv1d(2, 4, 3, stride=2, padding=1), head=Head(4))


@case(normal(1, 8, 8))
def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(6, 5),
        nn.ReLU(inplace=True),
        nn.Linear(5, 3),
    )
