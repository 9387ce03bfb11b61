/* A 1 GiB window at 0x40000000 to RAM above 4 GiB: long mode's page tables (2 MiB pages), 32-bit code in compatibility
   mode. Paging is on only while the window is looked through, since walking tables makes an emulated guest slow. Why long
   mode: KVM over PVM refuses CR0.PG without it. Not for anything but filling and checking. */
#include "guest.h"

static u64 tables[4][512] __attribute__((aligned(4096), section(".noinit,\"aw\",@nobits#")));

/* Shows the GiB that holds gpa (or turns paging off) and returns gpa's address in the window. */
u32 high_window(u64 gpa, u32 on) {
    static u64 shown;
    u32 cr0;
    u64 start = gpa & ~0x3fffffffull;
    __asm__ volatile("movl %%cr0, %0" : "=r"(cr0));
    if (on && start != shown) {
        shown = start;
        for (u32 i = 0; i < 512; i++) {
            tables[0][i] = tables[1][i] = 0;
            tables[2][i] = (u64)i << 21 | 0x83;
            tables[3][i] = (start + ((u64)i << 21)) | 0x83;
        }
        tables[0][0] = (u32)tables[1] | 3;
        tables[1][0] = (u32)tables[2] | 3;
        tables[1][1] = (u32)tables[3] | 3;
    }
    if (on)
        __asm__ volatile("movl %%cr4, %%eax; orl $0x20, %%eax; movl %%eax, %%cr4; movl %0, %%cr3;"
                         "movl $0xc0000080, %%ecx; rdmsr; orl $0x100, %%eax; wrmsr"
                         : : "r"(tables) : "eax", "ecx", "edx", "memory");
    cr0 = on ? cr0 | 0x80000000u : cr0 & 0x7fffffff;
    __asm__ volatile("movl %0, %%cr0; jmp 1f; 1:" : : "r"(cr0) : "memory");
    return 0x40000000 + ((u32)gpa & 0x3fffffff);
}
