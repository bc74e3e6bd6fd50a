#!/usr/bin/env bash
# Submit a job to Thinkbox Deadline: one prompt, one video a seed, a task each.
#
#   PYTHON=/opt/pavdm/.venv/bin/python OUTPUT=/shared/shots SEEDS=0-9 \
#     cluster/farms/deadline.sh "a red three drifting up" seconds=10 [key=value ...]
#
# Environment: OUTPUT (a folder on a share, or in a store: s3://...), SEEDS (a Deadline frame list), PYTHON and CHECKOUT
# (paths on the workers; default: this one's), DEADLINE (default deadlinecommand), NAME of the job.
set -euo pipefail
if (($# == 0)); then
  echo "deadline.sh: give a prompt" >&2
  exit 2
fi
prompt="$1"
shift
checkout="${CHECKOUT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}"
: "${OUTPUT:?deadline.sh: set OUTPUT to a folder that all workers share}"
if [[ "$OUTPUT" != /* && "$OUTPUT" != *://* ]]; then
  echo "deadline.sh: OUTPUT=$OUTPUT must be absolute: tasks run in folders of their own" >&2
  exit 2
fi

# Deadline keeps the arguments as one text; <QUOTE> becomes a quote, <STARTFRAME> the task's frame, here the seed.
arguments="<QUOTE>$checkout/cluster/farms/task.sh<QUOTE>"
for word in sample "prompt=$prompt" "seed=<STARTFRAME>" "output=$OUTPUT/<STARTFRAME%6>.mp4" "$@"; do
  if [[ "$word" == *[\"\<\>]* && "$word" != seed=* && "$word" != output=* ]]; then
    echo "deadline.sh: $word: Deadline's command line takes no \", < or >; put it into a CONFIG.yaml" >&2
    exit 2
  fi
  arguments+=" <QUOTE>$word<QUOTE>"
done

# Three tries a task: a machine that dies is tried elsewhere, and a command that is refused is refused in seconds.
exec "${DEADLINE:-deadlinecommand}" -SubmitCommandLineJob \
  -executable bash \
  -arguments "$arguments" \
  -frames "${SEEDS:-0}" -chunksize 1 \
  -name "${NAME:-pavdm: $prompt}" \
  -prop "EnvironmentKeyValue0=PYTHON=${PYTHON:-python3}" \
  -prop "EnvironmentKeyValue1=PROGRESS=deadline" \
  -prop OverrideTaskFailureDetection=true -prop FailureDetectionTaskErrors=3
