"""ONNX files and the proof that they compute what the model computes. Imports onnx; load it only where it is used."""

from convsurgery.export.onnx import DEFAULT_OPSET, OPSETS, export_onnx
from convsurgery.export.parity import Parity, verify_onnx

__all__ = ["DEFAULT_OPSET", "OPSETS", "Parity", "export_onnx", "verify_onnx"]
