#!/bin/sh
# Make vmlinuz and initrd.cpio in the current folder, of Debian's kernel for VMs and its busybox. Needs no root.
# What is there already (vmlinuz, busybox) is not fetched again.
set -eu

fetch() {
    apt-get download "$1"
    dpkg-deb -x "$1"_*.deb unpacked
}

if [ ! -e vmlinuz ]; then
    fetch "$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-.*\)/\1/p')"
    cp unpacked/boot/vmlinuz-* vmlinuz
fi
if [ ! -e busybox ]; then
    fetch busybox-static
    cp unpacked/bin/busybox busybox
fi

mkdir -p root/bin root/dev root/proc root/sys
cp busybox root/bin/busybox
ln -sf busybox root/bin/sh
cat >root/init <<'INIT'
#!/bin/sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
exec setsid -c sh </dev/ttyS0 >/dev/ttyS0 2>&1
INIT
chmod +x root/init
(cd root && find . | ../busybox cpio -o -H newc) >initrd.cpio
