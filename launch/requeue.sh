# The end of a batch script, after `srun ... || code=$?`: queue this job again where that is right, and no person has to
# decide. Its first rank says how it went by a word in the file $FASHION_DDP_AGAIN: srun's exit code may be that of another
# rank that was ended. What calls SLURM is this script on the node, so a container of the ranks needs none of its commands.
job=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # an array's own id would mean all its members
job=${job:-$SLURM_JOB_ID}
code=${code:-0} killed=
ask() { # scontrol, for 20 s at most. Not by `timeout`, which the SIGTERM ends that comes as soon as the job is queued again.
  scontrol "$@" 2>&1 &
  local pid=$! how=0
  (sleep 20 && kill -9 $pid) >/dev/null 2>&1 &
  wait $pid || how=$?
  kill -9 $! && wait $! || return $how
} 2>/dev/null
word=$(cat "$FASHION_DDP_AGAIN" 2>/dev/null) || word=
again() {
  if [[ $word != SIGUSR? ]]; then
    # Ranks were killed, or it is preempted with time to save. Else it is cancelled, or SLURM itself queues it again.
    # It shows as SIGNALING, not RUNNING, from a signal (the preemption's own) until the node's slurmd has answered.
    said=$(ask show job "$job") || return 1
    [[ $said =~ JobState=(RUNNING|SIGNALING) ]] && [[ $killed || $said == *PreemptTime=[0-9]* ]] || return 2
  fi
  [ ! $killed ] || echo killed >"$FASHION_DDP_AGAIN" || true # for the next start to read
  said=$(ask requeue "$job") && return
  [[ $said != *[Dd]isabled* && $said != *denied* && $said != *Invalid\ job* ]] || return 3
  return 1 # the controller may be away for a moment
}
case $code in 138 | 140) word=SIGUSR2 ;; esac # it met a rank that did not listen yet
case $word in
  SIGUSR?) ;; # the time is nearly over
  SIGTERM | begun)
    [ "$code" = 0 ] || killed=yes
    [ "$word" = SIGTERM ] || [ $killed ] || word= # finished
    ;;
  SIG*) code=75 word= ;; # it was told to stop
  # It failed by an error of its own, or did not begin; or SIGTERM met it before it listened, as where it is preempted.
  *) [ "$code" = 143 ] && word=SIGTERM || word= ;;
esac
rm -f "$FASHION_DDP_AGAIN"
if [ "$word" ]; then
  [ $killed ] && echo "ranks of this job were killed, or ended without a word" || [ "$code" = 143 ] || code=75
  trap '' TERM USR1 USR2 # TERM comes as soon as the job is queued again
  last_try=$((${SLURM_JOB_END_TIME:-$(date +%s) + 60} - 10)) told=
  while true; do
    again && echo "job $job is queued again, and continues there" && exit 0
    how=$?
    [ $how != 2 ] || break
    said=${said:-scontrol did not answer}
    if [ $how = 3 ] || [ "$(date +%s)" -gt "$last_try" ]; then
      echo "warning: not queued again: $said; \`python -m launch.status resubmit\` continues it"
      break
    fi
    [ $told ] || echo "not queued again yet: $said. The controller may be away for a moment: tried until shortly before" \
      "the job's end"
    told=yes
    sleep 3
  done
fi
exit "$code"
