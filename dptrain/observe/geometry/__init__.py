"""The norms in which gradients are measured."""

from dptrain.observe.geometry.adam import AdamGeometry
from dptrain.observe.geometry.base import Geometry, GeometryName, PlainGeometry, local

__all__ = ["AdamGeometry", "Geometry", "GeometryName", "PlainGeometry", "local"]
