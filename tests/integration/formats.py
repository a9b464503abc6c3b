"""Model folders of the formats that can run code, small and with weights whose answer is known beforehand."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch

HEAD = """
schema = 1
name = "{name}"
version = "1.0.0"
title = "{name}"
manufacturer = "A hospital"
licence = "MIT"
intended_use = "tests"
runtime = "{runtime}"
trusted = {trusted}
weights = [
{weights}
]
"""
SEGMENT = """
[inputs.ct]
modality = ["CT"]
axes = "{axes}"
[outputs]
activation = "labels"
[outputs.segments.1]
label = "Bone"
category = {{ value = "91723000", scheme = "SCT", meaning = "Anatomical Structure" }}
type = {{ value = "39607008", scheme = "SCT", meaning = "Lung" }}
colour = [240, 230, 140]
"""
DETECT = """
[inputs.ct]
modality = ["CT"]
[outputs.detections.mass]
label = "Mass"
category = { value = "49755003", scheme = "SCT", meaning = "Morphologically Abnormal Structure" }
finding = { value = "4147007", scheme = "SCT", meaning = "Mass" }
colour = [250, 200, 40]
threshold = 0.5
"""


def model_folder(
    root: Path, runtime: str, files: dict[str, bytes], rest: str, *, name: str = "model", trusted: bool = True
) -> Path:
    """Write a model's folder; `rest` begins with the top-level keys that are its own."""
    folder = root / name
    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    folder.mkdir(parents=True, exist_ok=True)
    weights = ",\n".join(
        f'{{ file = "{file}", sha256 = "{hashlib.sha256(content).hexdigest()}" }}' for file, content in files.items()
    )
    head = HEAD.format(name=name, runtime=runtime, weights=weights, trusted=str(trusted).lower())
    (folder / "model.toml").write_text(head + rest, encoding="utf-8")
    return folder


def saved(thing: Any) -> bytes:
    """Return what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def exported(network: torch.nn.Module, example: torch.Tensor) -> bytes:
    """Return a network of any size of volume as torch.export writes it."""
    buffer = io.BytesIO()
    sizes = {axis: torch.export.Dim(f"size{axis}", min=3, max=4096) for axis in (2, 3, 4)}
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=(sizes,)), buffer)
    return buffer.getvalue()


# -- nnU-Net ------------------------------------------------------------------------------------------------------

STEP = 0.4  # of the normalised intensity between one voxel and the one before, from which on it is label 1
MEAN, DEVIATION = -200.0, 500.0


def nnunet(
    spacing: list[float], patch: list[int], *, channels: int = 1, reads: int = 0, step: bool = True
) -> dict[str, bytes]:
    """Return the files of a trained nnU-Net whose label 1 is known beforehand, from one of its channels.

    With `step` it is where the normalised value exceeds that of the voxel before on the array's first axis by STEP;
    without, where it is above 0.
    """
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    network = PlainConvUNet(channels, 2, (2, 4), torch.nn.Conv3d, 3, ((1, 1, 1), (2, 2, 2)), 1, 2, 1, **_PLAIN)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        weights = dict(network.named_parameters())
        first = weights["encoder.stages.0.0.convs.0.conv.weight"]
        first[0, reads, 1, 1, 1] = 1.0
        first[0, reads, 0, 1, 1] = -1.0 if step else 0.0
        weights["decoder.stages.0.convs.0.conv.weight"][0, 2, 1, 1, 1] = 1.0  # the skip, after what comes from below
        weights["decoder.seg_layers.0.weight"][1, 0] = 10.0
        weights["decoder.seg_layers.0.bias"][1] = -10.0 * (STEP if step else 0.0)
    plans = _plans(spacing, patch, channels)
    dataset = {
        "channel_names": {str(number): "CT" for number in range(channels)},
        "labels": {"background": 0, "edge": 1},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    return {
        "plans.json": json.dumps(plans).encode(),
        "dataset.json": json.dumps(dataset).encode(),
        "fold_0/checkpoint_final.pth": saved(checkpoint),
    }


_PLAIN = {"conv_bias": True, "norm_op": None, "nonlin": torch.nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}}
_RESAMPLING = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}


def _plans(spacing: list[float], patch: list[int], channels: int) -> dict[str, Any]:
    name = "resample_data_or_seg_to_shape"
    full = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": patch,
        "median_image_size_in_voxels": patch,
        "spacing": spacing,
        "normalization_schemes": ["CTNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": name,
        "resampling_fn_seg": name,
        "resampling_fn_probabilities": name,
        "resampling_fn_data_kwargs": _RESAMPLING,
        "resampling_fn_seg_kwargs": _RESAMPLING | {"is_seg": True, "order": 0},
        "resampling_fn_probabilities_kwargs": _RESAMPLING,
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 2,
                "features_per_stage": [2, 4],
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": [[3, 3, 3], [3, 3, 3]],
                "strides": [[1, 1, 1], [2, 2, 2]],
                "n_conv_per_stage": [1, 1],
                "n_conv_per_stage_decoder": [1],
                "conv_bias": True,
                "norm_op": None,
                "norm_op_kwargs": None,
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    intensities = {"mean": MEAN, "std": DEVIATION, "percentile_00_5": -1000.0, "percentile_99_5": 1000.0}
    return {
        "dataset_name": "Dataset001_Test",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": patch,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [1, 0, 2],
        "transpose_backward": [1, 0, 2],
        "configurations": {"3d_fullres": full},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(number): intensities for number in range(channels)},
    }


# -- MONAI --------------------------------------------------------------------------------------------------------

UNET = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8], "strides": [2]}


def monai_segmentation(state: dict[str, torch.Tensor], *, pixdim: list[float] | None = None) -> dict[str, bytes]:
    """Return the files of a segmentation bundle, laid out as the published ones are."""
    spacing = [{"_target_": "Spacingd", "keys": ["image", "label"], "pixdim": pixdim, "mode": ["bilinear", "nearest"]}]
    config = {
        "imports": ["$import glob"],
        "bundle_root": "/nowhere",
        "output_dir": "$@bundle_root + '/eval'",
        "dataset_dir": "/nowhere",
        "datalist": "$list(sorted(glob.glob(@dataset_dir + '/imagesTs/*.nii.gz')))",
        "device": "$torch.device('cuda:0')",
        "network_def": {"_target_": "UNet", **UNET},
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": ["image", "label"], "reader": "ITKReader"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "label"},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
                *(spacing if pixdim else []),
                {"_target_": "ScaleIntensityRanged", "keys": "image", **_RANGE},
                {"_target_": "EnsureTyped", "keys": "image"},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "$[{'image': i} for i in @datalist]", "transform": "@preprocessing"},
        "inferer": {"_target_": "SimpleInferer"},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Activationsd", "keys": "pred", "softmax": True},
                {
                    "_target_": "Invertd",
                    "keys": "pred",
                    "transform": "@preprocessing",
                    "orig_keys": "image",
                    "nearest_interp": False,
                    "to_tensor": True,
                },
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir"},
            ],
        },
        "evaluator": {"_target_": "SupervisedEvaluator", "network": "@network", "amp": True},
        "run": ["$@evaluator.run()"],
    }
    return {"configs/inference.json": json.dumps(config).encode(), "models/model.pt": saved(state)}


_RANGE = {"a_min": -1000, "a_max": 1000, "b_min": 0.0, "b_max": 1.0, "clip": True}

ANCHORS = {"feature_map_scales": [1, 2, 4], "base_anchor_shapes": [[12, 20, 8]]}
_RESNET = "monai.networks.nets.resnet.resnet10(spatial_dims=3,n_input_channels=1,conv1_t_stride=[2,2,1])"
_PYRAMID = "monai.apps.detection.networks.retinanet_network.resnet_fpn_feature_extractor"
EXTRACTORS = {
    "published": f"${_PYRAMID}({_RESNET},3,False,[1,2],None)",
    "own": {"_target_": "scripts.net.Extractor"},
}
EXTRACTOR = '''"""Three levels of features, as a pyramid gives them."""
from collections import OrderedDict

import torch


class Extractor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.out_channels = 16
        self.first = torch.nn.Conv3d(1, 16, 7, stride=(4, 4, 2), padding=3)
        self.second = torch.nn.Conv3d(16, 16, 3, stride=2, padding=1)
        self.third = torch.nn.Conv3d(16, 16, 3, stride=2, padding=1)

    def forward(self, volume):
        fine = self.first(volume)
        middle = self.second(torch.relu(fine))
        return OrderedDict([("0", fine), ("1", middle), ("pool", self.third(torch.relu(middle)))])
'''
SELECTION = "score_thresh=0.02,topk_candidates_per_level=1000,nms_thresh=0.22,detections_per_img=300"

_INFERER = '''"""The published bundle brings its inferer as a script of its own."""
from monai.inferers.inferer import Inferer


class RetinaNetInferer(Inferer):
    def __init__(self, detector):
        Inferer.__init__(self)
        self.detector = detector

    def __call__(self, inputs, network, *args, **kwargs):
        self.detector.network = network
        self.detector.training = network.training
        return self.detector(inputs, *args, use_inferer=False, **kwargs)
'''


def monai_detection(state: dict[str, torch.Tensor], *, extractor: str, lps: bool, mode: str) -> dict[str, bytes]:
    """Return the files of a detection bundle, laid out as the published lung nodule detector is."""
    detection = "monai.apps.detection"
    config = {
        "whether_raw_luna16": False,
        "whether_resampled_luna16": "$(not @whether_raw_luna16)",
        "imports": ["$import glob", "$import os"],
        "bundle_root": "./",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "amp": True,
        "anchor_generator": {
            "_target_": f"{detection}.utils.anchor_utils.AnchorGeneratorWithAnchorShape",
            **ANCHORS,
        },
        "feature_extractor": EXTRACTORS[extractor],
        "network_def": {
            "_target_": "RetinaNet",
            "spatial_dims": 3,
            "num_classes": 1,
            "num_anchors": 1,
            "feature_extractor": "@feature_extractor",
            "size_divisible": [16, 16, 8],
        },
        "network": "$@network_def.to(@device)",
        "detector": {
            "_target_": "RetinaNetDetector",
            "network": "@network",
            "anchor_generator": "@anchor_generator",
            "debug": False,
        },
        "detector_ops": [
            "$@detector.set_target_keys(box_key='box', label_key='label')",
            f"$@detector.set_box_selector_parameters({SELECTION})",
        ],
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "LoadImaged",
                    "keys": "image",
                    "meta_key_postfix": "meta_dict",
                    "_disabled_": "@whether_raw_luna16",
                },
                {
                    "_target_": "LoadImaged",
                    "keys": "image",
                    "reader": "itkreader",
                    "affine_lps_to_ras": True,
                    "_disabled_": "@whether_resampled_luna16",
                },
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
                {"_target_": "ScaleIntensityRanged", "keys": "image", **_RANGE},
                {"_target_": "EnsureTyped", "keys": "image"},
            ],
        },
        "inferer": {"_target_": "scripts.detection_inferer.RetinaNetInferer", "detector": "@detector"},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "ClipBoxToImaged",
                    "box_keys": "box",
                    "label_keys": ["label", "label_scores"],
                    "box_ref_image_keys": "image",
                    "remove_empty": True,
                },
                {
                    "_target_": "AffineBoxToWorldCoordinated",
                    "box_keys": "box",
                    "box_ref_image_keys": "image",
                    "image_meta_key_postfix": "meta_dict",
                    "affine_lps_to_ras": lps,
                },
                {"_target_": "ConvertBoxModed", "box_keys": "box", "src_mode": "xyzxyz", "dst_mode": mode},
                {"_target_": "DeleteItemsd", "keys": ["image"]},
            ],
        },
        "evaluator": {
            "_target_": "scripts.evaluator.DetectionEvaluator",
            "_requires_": "@detector_ops",
            "network": "@network",
        },
        "evaluating": ["$@evaluator.run()"],
    }
    return {
        "configs/inference.json": json.dumps(config).encode(),
        "models/model.pt": saved(state),
        "scripts/__init__.py": b"",
        "scripts/net.py": EXTRACTOR.encode(),
        "scripts/detection_inferer.py": _INFERER.encode(),
    }
