"""Plain networks that timm lacks, with timm's interface. None of them has heard of a group."""

from gzoo.backbones.allcnn import allcnnc
from gzoo.backbones.cnn7 import cnn7
from gzoo.backbones.cnn13 import cnn13
from gzoo.backbones.resnet_cifar import resnet_cifar
from gzoo.backbones.sfcnn import cnn6, sfcnn
from gzoo.backbones.unet import UNet
from gzoo.backbones.wide_resnet import wide_resnet

__all__ = ["UNet", "allcnnc", "cnn6", "cnn7", "cnn13", "resnet_cifar", "sfcnn", "wide_resnet"]
