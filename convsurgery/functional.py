"""The functional forms of all operators, in the manner of ``torch.nn.functional``."""

from convsurgery.operators.kervolution import kerv_gauss, kerv_l1, kerv_l2, kerv_linear, kerv_poly, kerv_sigmoid

__all__ = ["kerv_gauss", "kerv_l1", "kerv_l2", "kerv_linear", "kerv_poly", "kerv_sigmoid"]
