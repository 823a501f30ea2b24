"""Run this project's KVM tests on two emulated hosts: kvm_amd under QEMU, kvm_intel under Bochs.

``python3 -m tests.hosts amd intel`` needs neither root nor /dev/kvm: both emulators carry out the
processor's virtualization instructions in software. Each host is Debian's cloud kernel with an
initrd that holds Debian's Python, pytest and this checkout. The modules, lowest first:

* packages: fetch and unpack Debian packages into a cache folder;
* initrd: what the host's root file system holds, written as cpio archives;
* linux, xen, gdb: archives of their own: Debian's cloud kernel to be a guest (and the stock one,
  where that is fast), Xen, a debugger;
* init.sh: the first process inside the host; it runs the command and sends the results out;
* machines: the two emulators, each a function from files to a command line;
* quirks: a pytest plugin for use inside the hosts;
* session: one boot of one host, from start to its results, within a time limit;
* report: JUnit XML of each host -> one table, test by host;
* __main__: the command line.
"""
