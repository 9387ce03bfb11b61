#!/bin/sh
# One folder for both machines of the lab, /srv/vm: NFS 4.2 from alpha's memory, which alpha itself mounts like anyone else, so that
# locks and caches are the same on both. No program of nfs-utils: the kernel's tables are filled here, for ever, instead of
# by answering its questions.   share.sh serve ADDRESS CLIENT...   share.sh mount SERVER OWN_ADDRESS
set -eu
forever=2147483647
serve() {
    modprobe nfsd
    # Where the server notes its clients; without it, it would wait for a program to do so.
    mkdir -p /srv/export /var/lib/nfs/v4recovery
    mountpoint -q /proc/fs/nfsd || mount -t nfsd nfsd /proc/fs/nfsd
    mountpoint -q /srv/export || mount -t tmpfs -o size=1g,mode=755 vm-images /srv/export
    # A client that does not renew its lease in time loses its locks, and these machines are slow.
    echo 10 >/proc/fs/nfsd/nfsv4gracetime
    echo 90 >/proc/fs/nfsd/nfsv4leasetime
    echo "-3 +4 +4.1 +4.2" >/proc/fs/nfsd/versions
    for client in "$@"; do
        echo "nfsd $client $forever lab" >/proc/net/rpc/auth.unix.ip/channel
    done
    # Flags: any port 0x2, no subtree check 0x400, has an fsid 0x2000. The fsid is 0: the root of what is exported.
    echo "lab /srv/export $forever 9218 65534 65534 0" >/proc/net/rpc/nfsd.export/channel
    echo "lab 1 \\x00000000 $forever /srv/export" >/proc/net/rpc/nfsd.fh/channel
    echo "tcp 2049" >/proc/fs/nfsd/portlist
    echo 4 >/proc/fs/nfsd/threads
    # Nobody has anything to reclaim.
    echo Y >/proc/fs/nfsd/v4_end_grace
}
case $1 in
    serve)
        shift
        serve "$@"
        ;;
    mount)
        modprobe nfsv4
        mkdir -p /srv/vm
        mount -i -t nfs4 -o "vers=4.2,hard,addr=$2,clientaddr=$3" "$2:/" /srv/vm
        ;;
esac
