"Run folders that tests share: weights that nobody trained."

import torch

from unipre3d.records import write_json
from unipre3d.runs.checkpoint import save_tensors
from unipre3d.runs.recipe import to_values


def save_run(folder, name, recipe, classes=()):
    "A run folder of a recipe, with weights drawn from seed 0."
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    state = recipe.build_model(len(classes)).state_dict()
    save_tensors(folder / "checkpoint.safetensors", state, {"step": 0})
    values = {"name": name, "task": recipe.task, "class_names": list(classes)}
    write_json(folder / "config.json", values | to_values(recipe))
    return folder
