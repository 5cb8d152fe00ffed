"""Networks of the papers that timm has not, registered with timm: importing this package makes their names known."""

from convsurgery.models.scaled_resnet import ScaledResNet, scaled_resnet18, scaled_resnet50

__all__ = ["ScaledResNet", "scaled_resnet18", "scaled_resnet50"]
