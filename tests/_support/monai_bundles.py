"""Small MONAI bundles in the usual dialects, on volumes from code, NIfTI or DICOM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import yaml
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SIDE = 8
TENSORS = "torch.rand({count}, 1, 8, 8, 8, generator=torch.Generator().manual_seed({seed}))"
MADE = "$[{{'image': x, 'label': (x > 0.4).float() + (x > 0.7).float()}} for x in " + TENSORS + "]"


def dataset(seed: int, count: int, files: Any = None) -> dict[str, Any]:
    """Return a dataset of one-channel volumes with three classes; `files` are read by MONAI's own readers."""
    if files is None:
        return {"_target_": "Dataset", "data": MADE.format(seed=seed, count=count)}
    keys = ["image", "label"]
    load = [
        {"_target_": "LoadImaged", "keys": keys},
        {"_target_": "EnsureChannelFirstd", "keys": keys},
        {"_target_": "ScaleIntensityd", "keys": "image"},
        {"_target_": "EnsureTyped", "keys": keys},
    ]
    return {"_target_": "Dataset", "data": files, "transform": {"_target_": "Compose", "transforms": load}}


def config(
    *, trainer: str = "train#trainer", run: Any = "run", epochs: str = "epochs", files: Any = None, **more: Any
) -> dict[str, Any]:
    """Return a training configuration; `trainer`, `run` and `epochs` are the ids that it uses for these."""
    engine = {
        "_target_": "SupervisedTrainer",
        "max_epochs": f"@{epochs}",
        "device": "cpu",
        "train_data_loader": {
            "_target_": "DataLoader",
            "dataset": dataset(0, 6, files),
            "batch_size": 2,
            "shuffle": True,
        },
        "network": "@network",
        "loss_function": "@loss",
        "optimizer": "@optimizer",
        "train_handlers": "@train#handlers",
    }
    made: dict[str, Any] = {
        "imports": ["$import ignite"],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "ckpt_dir": "$@bundle_root + '/models'",
        epochs: 2,
        "network": {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8]},
        "loss": {"_target_": "DiceLoss", "to_onehot_y": True, "softmax": True},
        "optimizer": {"_target_": "torch.optim.Adam", "params": "$@network.parameters()", "lr": 0.01},
        "lr_scheduler": {
            "_target_": "torch.optim.lr_scheduler.CosineAnnealingLR",
            "optimizer": "@optimizer",
            "T_max": f"@{epochs}",
        },
        "train": {
            "handlers": [
                {"_target_": "LrScheduleHandler", "lr_scheduler": "@lr_scheduler", "print_lr": False},
                {"_target_": "ValidationHandler", "validator": "@validate#evaluator", "interval": 1},
                {"_target_": "TensorBoardStatsHandler", "log_dir": "@output_dir", "iteration_log": False},
            ]
        },
        "validate": {
            "evaluator": {
                "_target_": "SupervisedEvaluator",
                "device": "cpu",
                "val_data_loader": {"_target_": "DataLoader", "dataset": dataset(99, 2, files), "batch_size": 1},
                "network": "@network",
                "postprocessing": {
                    "_target_": "AsDiscreted",
                    "keys": ["pred", "label"],
                    "argmax": [True, False],
                    "to_onehot": 3,
                },
                "key_val_metric": {
                    "val_mean_dice": {
                        "_target_": "MeanDice",
                        "include_background": False,
                        "output_transform": "$monai.handlers.from_engine(['pred', 'label'])",
                    }
                },
                "val_handlers": [
                    {
                        "_target_": "CheckpointSaver",
                        "save_dir": "@ckpt_dir",
                        "save_dict": {"model": "@network"},
                        "save_key_metric": True,
                        "key_metric_filename": "model.pt",
                    }
                ],
            }
        },
        "initialize": ["$monai.utils.set_determinism(seed=123)"],
    }
    made["network"]["strides"] = [2]
    owner, _, name = trainer.rpartition("#")
    (made[owner] if owner else made)[name] = engine
    start = f"$@{trainer}.run()"
    made.update({run: start} if isinstance(run, str) else {run[0]: [*run[1:], start]})
    return {**made, **more}


def write(folder: Path, made: dict[str, Any], name: str = "configs/train.json") -> str:
    """Write the bundle, and return its folder."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(made) if file.suffix == ".json" else yaml.safe_dump(made))
    (file.parent / "metadata.json").write_text('{"version": "0.1.0"}')
    return str(folder)


def nifti(folder: Path, count: int = 4) -> list[dict[str, str]]:
    """Write volumes and masks of three classes as NIfTI files."""
    folder.mkdir(parents=True)
    files = []
    for i in range(count):
        pair = {"image": str(folder / f"image-{i}.nii.gz"), "label": str(folder / f"label-{i}.nii.gz")}
        for array, path in zip(volume(i), pair.values(), strict=True):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
        files.append(pair)
    return files


def dicom(folder: Path, count: int = 4) -> list[dict[str, str]]:
    """Write the same volumes as DICOM series, one folder of slices each."""
    files = []
    for i in range(count):
        pair = {"image": str(folder / f"image-{i}"), "label": str(folder / f"label-{i}")}
        for array, path in zip(volume(i), pair.values(), strict=True):
            write_series(Path(path), (array * 100).astype(np.uint16) if array.dtype == np.float32 else array)
        files.append(pair)
    return files


def volume(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a float32 image and a uint16 mask, both of 8^3 voxels."""
    image = np.random.default_rng(seed).random((SIDE, SIDE, SIDE), dtype=np.float32)
    return image, ((image > 0.4).astype(np.uint16) + (image > 0.7)).astype(np.uint16)


def write_series(folder: Path, array: np.ndarray) -> None:
    folder.mkdir(parents=True)
    series = generate_uid()
    for number in range(array.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file = folder / f"{number:02d}.dcm"
        data = FileDataset(str(file), {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.Modality, data.InstanceNumber = series, "CT", number + 1
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, number], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.SliceThickness = [1, 1], 1
        data.Rows, data.Columns, data.SamplesPerPixel = *array.shape[:2], 1
        data.PhotometricInterpretation, data.PixelRepresentation = "MONOCHROME2", 0
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.PixelData = np.ascontiguousarray(array[:, :, number].T.astype(np.uint16)).tobytes()
        pydicom.dcmwrite(str(file), data)
