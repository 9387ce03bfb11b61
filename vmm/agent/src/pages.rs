//! Guest memory as the lanes want it, over guest memory as the plug maps it. Nothing but the joint of the two.

use crate::vm_config::VmConfig;
use limosa_link::Pages;
use limosa_plug::{GuestMemory, HugePages};
use limosa_proto::memory::{MemoryMap, PageRange};
use limosa_proto::wire::message::VmDescription;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

/// What the agent's mapping asks the kernel for: huge pages where the guest's file does (`thp`). Whoever touches a page first decides
/// how large it is, and for a guest that comes that is the agent.
pub(crate) fn huge_pages(vm: &VmDescription) -> HugePages {
    let text = std::str::from_utf8(&vm.config).unwrap_or_default();
    // One that is no configuration is refused by the VMM, in words.
    let asked = VmConfig::parse(Path::new("the guest's configuration"), text).is_ok_and(|config| config.thp);
    if asked { HugePages::Ask } else { HugePages::Never }
}

/// A guest's memory, mapped.
#[derive(Debug)]
pub(crate) struct GuestPages(pub(crate) GuestMemory);

impl Pages for GuestPages {
    fn memory_map(&self) -> &MemoryMap {
        self.0.memory_map()
    }

    fn gather(&self, socket: BorrowedFd<'_>, head: &[u8], runs: &[PageRange], done: u64, more: bool) -> io::Result<usize> {
        self.0.gather(socket, head, runs, done, more)
    }

    fn scatter(&self, socket: BorrowedFd<'_>, runs: &[PageRange], done: u64, tail: &mut [u8]) -> io::Result<usize> {
        self.0.scatter(socket, runs, done, tail)
    }

    fn read(&self, range: PageRange, offset: u64, out: &mut [u8]) {
        self.0.read(range, offset, out);
    }

    fn write(&self, range: PageRange, offset: u64, data: &[u8]) {
        self.0.write(range, offset, data);
    }

    fn scan(&self, range: PageRange, found: &mut dyn FnMut(PageRange, bool)) {
        self.0.scan(range, found);
    }

    fn zero(&self, range: PageRange) {
        self.0.zero(range);
    }

    fn data_extents(&self, range: PageRange) -> Vec<PageRange> {
        self.0.data_extents(range)
    }

    fn file(&self, index: usize) -> Option<(BorrowedFd<'_>, u64)> {
        self.0.file(index)
    }

    fn huge_pages(&self) -> bool {
        self.0.huge_pages() == HugePages::Ask
    }

    fn populate(&self, range: PageRange) -> io::Result<()> {
        self.0.populate(range)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use limosa_proto::identity::VmId;
    use limosa_proto::memory::{Gpa, Region};

    #[test]
    fn huge_pages_are_asked_for_where_the_guests_file_does() {
        let memory = MemoryMap::new(vec![Region { gpa: Gpa(0), bytes: 64 << 20, page_bytes: 4096 }]).unwrap();
        let of = |more: &str| {
            let config = format!("name = \"web\"\nmemory = \"64M\"\nkernel = \"/x\"\n{more}").into_bytes();
            let (id, name, vmm, memory) = (VmId([1; 16]), "web".into(), "limosa".into(), memory.clone());
            let (nics, disks, records) = (Vec::new(), Vec::new(), Vec::new());
            huge_pages(&VmDescription { id, name, vcpus: 1, memory, nics, disks, vmm, records, config, cpu: Default::default() })
        };
        let asked = ["thp = true\n", "thp = false\n", "", "thp = \"\\u0000\"\n", "]["].map(of);
        let (ask, never) = (HugePages::Ask, HugePages::Never);
        assert_eq!(asked, [ask, never, never, never, never]);
    }
}
