#!/usr/bin/env bash
# accelerate 1.15.0: `accelerate launch --cpu --num_processes 2` starts one process where MPI is not installed.
#
# Guess: two, which meet through gloo, as torchrun and `accelerate launch --multi_gpu` would start; or an error that names what is missing.
# Seen: one process, exit status 0. The script is told that it is process 0 of 1 and works on all data alone.
# torchrun with the same script starts two.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0 numpy==2.4.6
cat > "$folder/script.py" <<'PY'
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
print("process", accelerator.process_index, "of", accelerator.num_processes)
accelerator.end_training()
PY
export HF_HOME="$folder/home"
"$folder/env/bin/accelerate" launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "$folder/script.py" > "$folder/launch.txt"
"$folder/env/bin/torchrun" --standalone --nproc-per-node 2 "$folder/script.py" > "$folder/torchrun.txt"
echo "accelerate launch:"; cat "$folder/launch.txt"
echo "torchrun:"; sort "$folder/torchrun.txt"
grep -qx "process 0 of 1" "$folder/launch.txt"
test "$(grep -c "of 2" "$folder/torchrun.txt")" = 2
