# A bzImage around the flat image: setup header (boot protocol 2.12, 32-bit entry at 0x100000) and a small real-mode part,
# so that a BIOS loader (QEMU's) can start it too: it collects the e820 map, enters protected mode and jumps to code32_start.
# The first 4 KiB serve as boot_params then, as the loader has filled in the header's fields there.
        .code16
        .text
        .globl  _start
_start: .org    0x1f1
        .byte   15                      # setup_sects: 16 sectors with the first, 8 KiB
        .word   0
        .long   (payload_end - payload + 15) / 16
        .word   0, 0xffff, 0, 0xaa55
        .byte   0xeb, 0x66              # jmp to 0x268, which is also where the header ends
        .ascii  "HdrS"
        .word   0x20c
        .long   0
        .word   0, 0
        .byte   0, 1                    # loadflags: LOADED_HIGH
        .word   0
        .long   0x100000                # code32_start
        .long   0, 0, 0
        .word   0, 0
        .long   0                       # cmd_line_ptr
        .long   0x7fffffff              # initrd_addr_max
        .long   0x1000                  # kernel_alignment
        .byte   0, 12                   # not relocatable
        .word   0
        .long   2047                    # cmdline_size
        .long   0, 0, 0, 0, 0, 0, 0
        .quad   0x100000                # pref_address
        .long   0xf1000                 # init_size: up to the end of the report page
        .long   0
        .org    0x268
        jmp     real
        .org    0x1000
real:   cli
        cld
        movw    %cs, %ax                # CS is 0x20 paragraphs above the start
        subw    $0x20, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movb    $0, 0x1e8
        xorl    %ebx, %ebx
        movw    $0x2d0, %di
1:      movl    $0xe820, %eax
        movl    $20, %ecx
        movl    $0x534d4150, %edx
        int     $0x15
        jc      2f
        incb    0x1e8
        addw    $20, %di
        testl   %ebx, %ebx
        jz      2f
        cmpb    $64, 0x1e8
        jb      1b
2:      cli
        xorl    %esi, %esi
        movw    %ds, %si
        shll    $4, %esi                # boot_params
        leal    gdt(%esi), %eax
        movl    %eax, gdt_base
        lgdtl   gdt_limit
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        movw    $0x18, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        ljmpl   *%cs:(target - 0x200)
target: .long   0x100000
        .word   0x10
        .balign 8
gdt:    .quad   0, 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_limit:
        .word   31
gdt_base:
        .long   0
        .org    0x2000
payload:
        .incbin "guest.bin"
        .balign 16
payload_end:
