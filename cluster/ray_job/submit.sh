#!/usr/bin/env bash
# Submit a `pavdm` command to a running Ray cluster as a Ray job and follow its log; the status is 1 if it fails. The same
# command again leaves complete videos alone, and goes on with those that were interrupted.
#
#   cluster/ray_job/submit.sh sample "a red three" num_stages=2 output=/shared/three.mp4      any verb and its words
#                                                    (what it writes to is named there, by absolute paths)
#   cluster/ray_job/submit.sh [key=value ...]        the 60 s demo, with further settings of `pavdm sample`
#
# Environment:
#   RAY_API_SERVER_ADDRESS  dashboard of the cluster (default http://127.0.0.1:8265)
#   PYTHON   interpreter on the cluster's machines that has this project's packages (default: this one's python3)
#   OUTPUT   of the demo: absolute path on the machine that runs the driver, the head by default, or in a store
#            (s3://...) (default: ./demo.mp4 from here)
#   SUBMISSION_ID   the job's id, by which `ray job stop` and `ray job logs` know it (default: one that Ray makes up)
#   RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token: the cluster's token, where it was started with one;
#            RAY_AUTH_MODE=disabled sends none
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
address="${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}"
# `python` on a worker may be the system's, without ray: name the interpreter.
python="${PYTHON:-$(command -v python3)}"

# A relative path would be one of the folder that Ray makes for the job: what is written there goes with it.
check_place() { # PATH, and the words to tell it by
  [[ "$1" == /* || "$1" == *://* ]] && return
  echo "submit.sh: $2 must be absolute: a job's own folder is deleted after it" >&2
  exit 2
}
if (($# > 0)) && [[ "$1" =~ ^[a-z]+(-[a-z]+)*$ ]]; then
  command=("$@")
else
  output="${OUTPUT:-$PWD/demo.mp4}"
  check_place "$output" "OUTPUT=$output"
  command=(sample "a red three drifting up and to the left, a blue seven bouncing"
    seconds=60 num_stages=2 "output=$output" "$@")
fi

check_manifest() { # a word of `farm run`
  local suffix
  [[ "$1" =~ ^[A-Za-z_][A-Za-z0-9_.-]*= || "$1" == /* || "$1" == *://* ]] && return
  suffix=$(tr '[:upper:]' '[:lower:]' <<<"${1##*.}")
  case "$suffix" in
    jsonl | ndjson | csv | tsv | txt)
      echo "submit.sh: $1 must be absolute, and lie where the job's driver can read it: only code is sent" >&2
      exit 2
      ;;
  esac
}
case "${command[0]} ${command[1]:-}" in
  "farm retry" | "farm status" | "farm report" | "export vbench") folder=2 ;; # the second word that is no option
  *) folder= ;;
esac
# What these verbs write to unless told otherwise, by default or as a config file says, is a relative path.
case "${command[0]} ${command[1]:-}" in
  sample\ *) needed=output or=", or --resume DIR" ;;
  train\ *) needed=run_dir or= ;;
  "data prepare") needed=output or= ;;
  *) needed= or= ;;
esac
words=0 before=
for word in "${command[@]:1}"; do
  case "$before" in
    --out) check_place "$word" "$before $word" ;;
    --resume)
      check_place "$word" "$before $word"
      needed=
      ;;
    *)
      case "$word" in
        -h | --help | --dry-run | --print-config) needed= ;; # nothing is written
        --out=*) check_place "${word#--out=}" "$word" ;;
        --resume=*)
          check_place "${word#--resume=}" "$word"
          needed=
          ;;
        -* | output=null | run_dir=null | export=null | trace=null | chart=null | cluster.chart=null) ;;
        output=* | run_dir=* | export=* | trace=* | chart=* | cluster.chart=*)
          check_place "${word#*=}" "$word"
          [[ "${word%%=*}" != "$needed" ]] || needed=
          ;;
        *)
          ((++words))
          [[ "$words" != "$folder" ]] || check_place "$word" "$word"
          [[ "${command[0]} ${command[1]}" != "farm run" ]] || check_manifest "$word"
          ;;
      esac
      ;;
  esac
  before="$word"
done
if [[ -n "$needed" ]]; then
  echo "submit.sh: ${command[0]} needs $needed=PATH on the command line, absolute or in a store (s3://...)$or:" \
    "the default and what config files say may lie in the job's own folder, which is deleted after it" >&2
  exit 2
fi

# The code is sent, and nothing that lies beside it: prepared data, videos, runs. Ray packs it without compressing it, and
# its dashboard takes 100 MiB: what is not code is refused here, before minutes of packing. One of these is for the names.
sent=(pavdm_dist configs)
sizes() { (cd "$repository" && find "${sent[@]}" -name __pycache__ -prune -o -type f -exec wc -c {} +) | grep -v ' total$'; }
bytes=$(sizes | awk '{sum += $1} END {printf "%.0f", sum}')
if ((bytes > 99 << 20)); then
  echo "submit.sh: ${sent[*]} in $repository hold $((bytes >> 20)) MiB, and Ray takes 100: move what is not code elsewhere;" \
    "the largest is $(sizes | sort -rn | sed -n '1s/^ *[0-9]* //p')" >&2
  exit 2
fi
excludes='"/??*"' # of the working tree's files and folders all but these; a pattern that takes "." would take all of them
for folder in "${sent[@]}"; do excludes+=", \"!/$folder\", \"!/$folder/**\""; done

# Ray's client sends a token only when told to; one that the cluster doesn't ask for does no harm.
if [[ -n "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" || -f "${HOME:-/nonexistent}/.ray/auth_token" ]]; then
  export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
fi

exec "$python" -m ray.scripts.scripts job submit \
  --address "$address" \
  --working-dir "$repository" \
  --runtime-env-json "{\"excludes\": [$excludes], \"env_vars\": {\"OMP_NUM_THREADS\": \"1\"}}" \
  ${SUBMISSION_ID:+--submission-id "$SUBMISSION_ID"} \
  -- \
  "$python" -m pavdm_dist "${command[@]}"
