# A 64-bit ELF container (what linux-loader and Cloud Hypervisor accept) around the flat 32-bit image, with its PVH note.
        .section .note.pvh, "a", @note
        .balign 4
        .long   4, 8, 18                # "Xen", 8 bytes, XEN_ELFNOTE_PHYS32_ENTRY
        .asciz  "Xen"
        .quad   0x100010
        .section .image, "awx", @progbits
image:  .incbin "guest.bin"
image_end:
        .section .rest, "aw", @nobits
        .skip   0xf1000 - 64 - (image_end - image)      # to the end of the report page, bar the note and its alignment
