"""Networks of the papers that timm has not, registered with timm: importing this package makes their names known."""

from convsurgery.models.rdnet import RDNet, rdnet_a, rdnet_b, rdnet_c
from convsurgery.models.scaled_resnet import ScaledResNet, scaled_resnet18, scaled_resnet50

__all__ = ["RDNet", "ScaledResNet", "rdnet_a", "rdnet_b", "rdnet_c", "scaled_resnet18", "scaled_resnet50"]
