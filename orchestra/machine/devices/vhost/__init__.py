"""virtio devices whose queues another process serves: the front-end of vhost-user (QEMU's docs/interop/vhost-user.rst).

    messages    what goes over the socket, as bytes: pure
    frontend    the socket: one request at a time, each within its time
    lending     the queues of a device: lent, recalled, and when
    backend     the thread that speaks to one back-end
    pace        how much of a CPU that thread may have: pure
    daemon      a back-end that is a process of ours
    qemu        the daemon that serves qcow2 images: its command line, and what its complaints mean
    device      the virtio devices

It may import what `machine/devices` may. The one to copy: `device.py`.
"""
