# The end of a batch script, after `srun ... || code=$?`: queue this job again where its first rank has asked for that.
# It does so by a file, $FASHION_DDP_AGAIN with the signal's name: an exit code of srun's may be that of another rank
# that was ended. What calls SLURM is this script on the node, so a container of the ranks needs none of its commands.
job=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # an array's own id would mean all its members
job=${job:-$SLURM_JOB_ID}
again() {
  case $1 in
    SIGUSR1 | SIGUSR2) ;; # sbatch's --signal: the time is nearly over
    *)
      # SIGTERM: preempted with time to save, or cancelled, or SLURM itself queues it again. Only the first is ours.
      shown=$(timeout 20 scontrol show job "$job" 2>&1) || return 1
      [[ $shown == *JobState=RUNNING* && $shown == *PreemptTime=[0-9]* ]] || return 2
      ;;
  esac
  shown=$(timeout 20 scontrol requeue "$job" 2>&1) || return 1
}
if reason=$(cat "$FASHION_DDP_AGAIN" 2>/dev/null); then
  trap '' TERM # which comes as soon as the job is queued again
  rm -f "$FASHION_DDP_AGAIN"
  code=75 last_try=$((${SLURM_JOB_END_TIME:-$(date +%s) + 60} - 10)) told=
  while true; do
    again "$reason" && echo "job $job is queued again, and continues there" && exit 0
    [ $? = 2 ] && break
    if [ "$(date +%s)" -gt "$last_try" ]; then
      echo "warning: not queued again: ${shown:-scontrol did not answer}; \`python -m launch.status resubmit\` continues it"
      break
    fi
    [ "$told" ] || echo "not queued again yet: ${shown:-scontrol did not answer}. The controller may be away for a" \
      "moment: tried until shortly before the job's end"
    told=yes
    sleep 3
  done
fi
exit "${code:-0}"
