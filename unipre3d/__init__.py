"""Modules:

- `unipre3d.kernels.conv`: Sparse convolution on the CPU: the compiled functions of `unipre3d.geometry.sparse`, forward and backward.
- `unipre3d.kernels.points`: Neighbours and farthest points on the CPU: the compiled functions of `geometry.pointops`.
- `unipre3d.kernels.scan`: The selective scan on the CPU: the compiled functions of `unipre3d.backbones.mamba`, forward and backward.
- `unipre3d.kernels.splat`: Gaussian splatting on the CPU: every compiled function of `unipre3d.render`, forward and backward."""

__version__ = "0.1.0"
