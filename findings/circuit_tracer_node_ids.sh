#!/usr/bin/env bash
# circuit-tracer gives two nodes of a graph the same id: a latent of layer 0, and another layer's error.
#
# Guess: `node_id` tells the nodes of a graph apart: links name their two ends by it.
# Seen:  latent 3 of layer 0 and the error of layer 3 are both `0_3_5` at position 5. Any active latent of layer 0
#        whose number is below the number of layers collides so; links from the two can no longer be told apart.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet pydantic==2.12.5
"$folder/env/bin/pip" install --quiet --no-deps circuit-tracer==0.5.0
cat > "$folder/show.py" <<'PY'
import importlib.util
from pathlib import Path

# The file of the models alone: the package around it wants torch and transformers, and these models do not.
package = Path(importlib.util.find_spec("circuit_tracer").origin).parent
spec = importlib.util.spec_from_file_location("graph_models", package / "frontend" / "graph_models.py")
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)
print(models.Node.feature_node(layer=0, pos=5, feat_idx=3).node_id, models.Node.error_node(layer=3, pos=5).node_id)
PY
read -r latent error < <("$folder/env/bin/python" "$folder/show.py")
echo "guess: two nodes have two ids"
echo "seen:  latent 3 of layer 0 at position 5 is $latent, the error of layer 3 at position 5 is $error"
[[ $latent == 0_3_5 && $error == 0_3_5 ]]
