"""ResNets of any width, the first convolution included: what the perturbation paper counts parameters of."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, make_blocks
from torch import nn

__all__ = ["ScaledResNet", "scaled_resnet18", "scaled_resnet50"]


class ScaledResNet(ResNet):  # type: ignore[misc]
    """timm's ResNet with stages of width, 2·width, 4·width and 8·width, behind a first convolution of ``width``.

    timm's own takes the widths of the stages and keeps 64 channels in front. Juefei-Xu et al. (2018), Table 5, scale
    all of it: with every 3x3 convolution of the blocks made a perturbation layer, widths of 160, 128, 96, 64 and 32
    have 1.3, 2.0, 3.5, 7.9 and 31.0 times fewer parameters than ResNet-18 (10 classes).

    Args:
        block, layers: as timm's ResNet.
        width: channels of the first convolution and stage, a positive integer.
        in_chans, options: as timm's ResNet.
    """

    def __init__(
        self, block: type[nn.Module], layers: tuple[int, ...], width: int = 64, in_chans: int = 3, **options: Any
    ) -> None:
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"width must be a positive integer, not {width!r}")
        super().__init__(block, layers, in_chans=in_chans, channels=(width, 2 * width, 4 * width, 8 * width), **options)
        self.conv1 = nn.Conv2d(in_chans, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages, _ = make_blocks((block,), (width,), layers[:1], width, act_layer=nn.ReLU, norm_layer=nn.BatchNorm2d)
        self.layer1 = stages[0][1]
        self.feature_info[0]["num_chs"] = width
        self.init_weights()


def _create(variant: str, pretrained: bool, **options: Any) -> nn.Module:
    model: nn.Module = build_model_with_cfg(ScaledResNet, variant, pretrained, **options)
    return model


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for name in ("scaled_resnet18", "scaled_resnet50")
    }
)


@register_model  # type: ignore[untyped-decorator]
def scaled_resnet18(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNet-18 of a width of your choice: ``timm.create_model("scaled_resnet18", width=32)``; there are no weights."""
    return _create("scaled_resnet18", pretrained, block=BasicBlock, layers=(2, 2, 2, 2), **options)


@register_model  # type: ignore[untyped-decorator]
def scaled_resnet50(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNet-50 of a width of your choice; there are no weights."""
    return _create("scaled_resnet50", pretrained, block=Bottleneck, layers=(3, 4, 6, 3), **options)
