"""No prediction lost: starts, calibration, choosing and blending on a network trained here, in under two minutes.

    python examples/convert_without_loss.py

Needs convsurgery[demo]; nothing is fetched: the data are scikit-learn's digits.
"""

from __future__ import annotations

import timm
import torch

import convsurgery as cs
from convsurgery.adapt import load_data


def kept(new: torch.nn.Module, model: torch.nn.Module, data: object) -> str:
    result = cs.evaluate(new, data.val, teacher=model)
    return f"{result.kept} of {result.samples} answers kept"


def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10)
    data = load_data("digits", model=model, batch_size=64, img_size=32, augment=False)
    cs.finetune(model, data, epochs=5, lr=2e-3, kd_alpha=0, progress=False)
    model.eval()
    images = torch.cat([batch for batch, _ in data.train])[:512]
    print(f"ResNet-18 on digits: top-1 {cs.evaluate(model, data.val).top1:.2f}\n")

    print("1. Kernels that have a neutral setting begin as the convolution.")
    for kernel in ("kerv-poly", "kerv-sigmoid", "kerv-gauss", "kerv-l2"):
        new = cs.convert(model, f"all-conv->{kernel}")
        print(f"   all-conv->{kernel}: {kept(new, model, data)}")

    print("\n2. Data choose ε: as nonlinear as a relative error of 1e-3 in each layer allows.")
    new = cs.convert(model, "conv[name=layer1.*]->kerv-poly")
    print(cs.calibrate(new, images[:128], teacher=model, target=1e-3, progress=False))
    print(f"   {kept(new, model, data)}")

    print("\n3. Others are fitted: least squares on data, against the nearest weights without.")
    rule = "conv[k=3, s=1, cin=cout]->linear-mix"
    print(f"   by project: {kept(cs.convert(model, f'{rule} by project'), model, data)}")
    print(f"   by fit:     {kept(cs.convert(model, f'{rule} by fit', calibration=images), model, data)}")

    print("\n4. Which convolutions? Scan, choose, convert, measure.")
    result = cs.auto(model, "conv[k=3]->auto(linear-mix | pnn, params<=-60%, agreement>=0.98)", images)
    print(result)
    print(f"   on the test images: {kept(result.model, model, data)}")

    print("\n5. What can be had in no other way is blended in while training.")
    new = cs.convert(model, "conv[name=layer1.0.*]->kerv-l1 by blend", calibration=images[:128])
    print(f"   at t = 0: {kept(new, model, data)}")
    run = cs.finetune(new, data, teacher=model, epochs=2, lr=1e-3, blend_epochs=1, progress=False)
    print(f"   after two epochs: top-1 {run.last.val_top1:.2f}, blends left: {len(cs.blends(new))}")


if __name__ == "__main__":
    main()
