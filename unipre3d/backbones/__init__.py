"""Backbones: one model a file; each has `stem`, `body`, `norm`, `stem_width` and `width`."""
from unipre3d.backbones.mamba3d import Mamba3D
from unipre3d.backbones.pcm import PCM
from unipre3d.backbones.pointmlp import PointMLP
from unipre3d.backbones.pointnet2 import PointNet2
from unipre3d.backbones.ptv3 import PTv3
from unipre3d.backbones.sparseunet import SparseUNet
from unipre3d.backbones.transformer import StandardTransformer
