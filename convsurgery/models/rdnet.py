"""The reference networks of the low-cost paper, with six kinds of steps; parameter counts as in its Table 2."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from convsurgery.operators.diffusion import ReactionDiffusion2d
from convsurgery.operators.linear_mix import LinearMix2d

__all__ = ["STEPS", "RDNet", "rdnet_a", "rdnet_b", "rdnet_c"]

STEPS = ("resnet", "mobilenet", "linear-mix", "explicit", "implicit", "circulant")


class ResidualStep(nn.Module):
    """y + K₂ relu(norm(K₁ y)), eq. 1 and 3; K are full 3x3 convolutions, or LinearMix."""

    def __init__(self, channels: int, layer: Any) -> None:
        super().__init__()
        self.conv1 = layer(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = layer(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(self.act(self.norm(self.conv1(x))))
        return out


class MobileStep(nn.Sequential):
    """relu(norm(M relu(norm(K_dw y)))), eq. 13."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )


class Connection(nn.Module):
    """norm([x; K_dw x]), which doubles the channels, then 2x2 average pooling."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pool(self.norm(torch.cat([x, self.conv(x)], 1)))
        return out


def make_step(channels: int, kind: str, time_step: float) -> nn.Module:
    """One step of a stage; ValueError for a kind that is not in :data:`STEPS`."""
    if kind == "resnet":
        return ResidualStep(channels, nn.Conv2d)
    if kind == "linear-mix":
        return ResidualStep(channels, LinearMix2d)
    if kind == "mobilenet":
        return MobileStep(channels)
    if kind in ("explicit", "implicit", "circulant"):
        return ReactionDiffusion2d(channels, form=kind, step=time_step)
    raise ValueError(f"step must be one of {', '.join(STEPS)}, not {kind!r}")


class RDNet(nn.Module):
    """The network of the paper's experiments: an opening convolution, stages of four steps, connections that double.

    *Low-Cost Parameterizations of Deep Convolutional Neural Networks*, §4: a 5x5 convolution to the first width, norm
    and relu; for every width four steps and a connection ``norm([x; K_dw x])`` with 2x2 average pooling; global average
    and a linear classifier. The paper's counts leave the normalisation out.

    Args:
        widths: channels of each stage; each is twice the one before.
        step: kind of the steps, one of ``STEPS``.
        time_step: h of the reaction-diffusion kinds.
        depth: steps in each stage.
        num_classes, in_chans, global_pool, drop_rate: as timm's models.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 64, 128),
        step: str = "explicit",
        time_step: float = 0.1,
        depth: int = 4,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if any(after != 2 * before for before, after in itertools.pairwise(widths)):
            raise ValueError(f"every width must be twice the one before, not {widths}")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.conv_stem = nn.Conv2d(in_chans, widths[0], 5, padding=2, bias=False)
        self.norm_stem = nn.BatchNorm2d(widths[0])
        self.act_stem = nn.ReLU(inplace=True)
        self.feature_info = [{"num_chs": widths[0], "reduction": 1, "module": "act_stem"}]
        stages = []
        for number, width in enumerate(widths):
            steps = [make_step(width, step, time_step) for _ in range(depth)]
            stages.append(nn.Sequential(*steps, Connection(width)))
            self.feature_info.append(
                {"num_chs": 2 * width, "reduction": 2 ** (number + 1), "module": f"stages.{number}"}
            )
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = 2 * widths[-1]
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)

    def get_classifier(self) -> nn.Module:
        """The linear classifier."""
        classifier: nn.Module = self.head.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of so many classes."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's maps."""
        out: Tensor = self.stages(self.act_stem(self.norm_stem(self.conv_stem(x))))
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits from the last maps, or what the classifier is given."""
        out: Tensor = self.head(x, pre_logits=pre_logits)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _create(variant: str, pretrained: bool, **options: Any) -> nn.Module:
    indices = tuple(range(len(options["widths"]) + 1))
    features = {"flatten_sequential": True, "out_indices": options.pop("out_indices", indices)}
    model: nn.Module = build_model_with_cfg(RDNet, variant, pretrained, feature_cfg=features, **options)
    return model


default_cfgs = generate_default_cfgs(
    {
        f"rdnet_{size}.untrained": {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "conv_stem",
            "classifier": "head.fc",
        }
        for size in "abc"
    }
)


@register_model  # type: ignore[untyped-decorator]
def rdnet_a(pretrained: bool = False, **options: Any) -> nn.Module:
    """Widths 32, 64, 128: ``timm.create_model("rdnet_a", step="implicit", num_classes=10)``; there are no weights."""
    return _create("rdnet_a", pretrained, widths=(32, 64, 128), **options)


@register_model  # type: ignore[untyped-decorator]
def rdnet_b(pretrained: bool = False, **options: Any) -> nn.Module:
    """Widths 48, 96, 192; there are no weights."""
    return _create("rdnet_b", pretrained, widths=(48, 96, 192), **options)


@register_model  # type: ignore[untyped-decorator]
def rdnet_c(pretrained: bool = False, **options: Any) -> nn.Module:
    """Widths 32, 64, 128, 256; there are no weights."""
    return _create("rdnet_c", pretrained, widths=(32, 64, 128, 256), **options)
