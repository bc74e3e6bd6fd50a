#!/usr/bin/env bash
# One task of a render farm (Deadline, OpenCue, Tractor, ...): a `pavdm` command whose progress and whose end the farm
# understands. A task that is given to another machine goes on with what the first one left: outputs must be on a share.
#
#   cluster/farms/task.sh sample "a red three" seed=7 output=/shared/three-7.mp4
#
# Environment:
#   PYTHON    interpreter with this project (default python3)
#   PROGRESS  lines that the farm reads: deadline ("Progress: 42%"), openjd ("openjd_progress: 42.0"), or auto (log
#             lines only: farms that watch how old the last line is, as OpenCue does)
#   STATUS_REFUSED, STATUS_FAILED, STATUS_STOPPED   exit statuses of this script for commands that were refused (nothing
#             was rendered, another try ends the same way), that made all but some videos (another try makes those),
#             and that a signal ended with something left (another try goes on); defaults 2, 1 and 1. Whatever else is
#             handed on: 0 says that nothing is left.
set -uo pipefail

# A farm that takes its machine back tells this shell; what is finished is saved by the command, which needs a moment.
child= told=
trap 'told=1; [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null' TERM INT HUP
"${PYTHON:-python3}" -m pavdm_dist "$@" "progress=${PROGRESS:-auto}" &
child=$!
[[ -z "$told" ]] || kill -TERM "$child" 2>/dev/null # said before there was whom to tell
# A signal ends a wait, not the command: wait until it is gone, then ask how it ended.
while kill -0 "$child" 2>/dev/null; do wait "$child"; done
status=0
wait "$child" || status=$?

case $status in
  0) exit 0 ;;
  2) echo "task.sh: refused, or ended as a whole; the line above says why" && exit "${STATUS_REFUSED:-2}" ;;
  10[1-9] | 11[0-9] | 12[0-5])
    echo "task.sh: $((status - 100)) video(s) failed, all others are complete" && exit "${STATUS_FAILED:-1}"
    ;;
  129 | 130 | 143) echo "task.sh: stopped; the same task goes on" && exit "${STATUS_STOPPED:-1}" ;;
  *) exit "$status" ;;
esac
