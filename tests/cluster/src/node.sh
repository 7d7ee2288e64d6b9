# The first process of a node: makes the mounts that are the node's own, then waits for whatever becomes its child.
# $1 is the node's directory; its mount, PID and network namespaces are new already.
set -e
dir=$1

# The machine's own view of its namespaces is not the node's business, and would keep them alive.
umount -R -l /run/netns 2>/dev/null || true
mount -t tmpfs -o mode=755 tmpfs /run

for place in opt var/lib var/log; do
    mkdir -p "$dir/$place"
    mount --bind "$dir/$place" "/$place"
done
mkdir -p "$dir/etc" "$dir/etc.work"
mount -t overlay -o "lowerdir=/etc,upperdir=$dir/etc,workdir=$dir/etc.work" overlay /etc

# A sysfs shows the network devices of the namespace it is mounted in. The machine's goes, with the bpffs on it: programs
# that find two bpffs in the mount table pin to the wrong one.
mkdir -p /run/cgroup
mount --rbind /sys/fs/cgroup /run/cgroup
umount -R -l /sys
mount -t sysfs sysfs /sys
mount --rbind /run/cgroup /sys/fs/cgroup
umount -l /run/cgroup
rmdir /run/cgroup
mount -t bpf -o mode=700 bpf /sys/fs/bpf
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null || true
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null || true

# The kubelet sets these, for the whole machine. It is shown what it wants to see instead.
mkdir -p /run/sysctl
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
    kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
    file=/run/sysctl/$(echo "${setting%=*}" | tr / .)
    echo "${setting#*=}" >"$file"
    mount --bind "$file" "/proc/sys/${setting%=*}"
done

mount --make-rshared /
mkdir -p /run/lock /run/netns
: >/run/node-is-ready
echo "node is ready"

# Waiting reaps what loses its parent. SIGTERM and the like are not for the first process.
while :; do
    sleep 100000 &
    wait $! || true
done
